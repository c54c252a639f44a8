"""Vim: a plain backbone of bidirectional selective scans.

Written from a description of behaviour of the published networks, so that their weights load; from
Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space
Model" (arXiv 2401.09417).
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from mmhybrid.families.vim import VIM
from mmhybrid.layers import MapPool, PortableSyncBatchNorm, RMSNorm, VimMixer
from mmhybrid.registry import MODELS

from ..arguments import (
    check_flags,
    check_integers,
    check_out_indices,
    checked_architecture,
    strict_arguments,
)
from .plain import PlainBackbone

__all__ = ['ARCHITECTURES', 'Vim']

ARCHITECTURES = VIM.architectures
_REQUIRED = VIM.required
_OPTIONAL = VIM.optional


def checked_vim_architecture(arch: str | dict) -> dict:
    """Complete and check ``arch``."""
    arch = checked_architecture(arch, ARCHITECTURES, _REQUIRED, _OPTIONAL)
    check_integers("arch['dim']", [arch['dim']], 4)
    if arch['dim'] % 4:
        raise ValueError(f"got arch['dim']={arch['dim']}, expected a multiple of 4")
    check_integers("arch['depth']", [arch['depth']], 1)
    check_integers("arch['state_dim']", [arch['state_dim']], 1)
    if arch['dt_rank'] is not None:
        check_integers("arch['dt_rank']", [arch['dt_rank']], 1)
    return arch


class VimTrunk(PlainBackbone):
    """Tokens and blocks of Vim; see :class:`Vim` for the arguments."""

    may_differ = r'(norm_f|head|rope|fpn\d)\.|cls_token'

    def __init__(self, arch: dict, *, img_size, stride, class_token, rope, divide, drop_path_rate,
                 in_channels, frozen_stages, with_cp, scan_backend, lora,
                 init_cfg):
        if stride not in (8, 16):
            raise ValueError(f'got stride={stride!r}, expected 16, or 8 for the models that were '
                             'fine-tuned on a finer grid')
        check_flags(divide=divide)
        mixers = [
            VimMixer(arch['dim'], arch['state_dim'], dt_rank=arch['dt_rank'], divide=divide,
                     depth=arch['depth'], backend=scan_backend) for _ in range(arch['depth'])]
        super().__init__(
            mixers, arch['dim'], partial(RMSNorm, eps=1e-5, feeds_linear=True), img_size=img_size,
            stride=stride, class_token=class_token, rope=rope, interpolate_rope=False,
            drop_path_rate=drop_path_rate, in_channels=in_channels, frozen_stages=frozen_stages,
            with_cp=with_cp, lora=lora, init_cfg=init_cfg)


@MODELS.register_module()
@strict_arguments
class Vim(VimTrunk):
    """Vim backbone for dense prediction.

    Takes images (B, in_channels, H, W) of any size and returns a tuple of maps, with
    ``out_channels`` channels at ``out_strides`` pixels.  Images are padded with zeros on the right
    and at the bottom to whole patches.  Parameter names are those of the published weights.

    Args:
        arch: tiny, small or base, or a dictionary with the keys dim and depth and optionally
            state_dim (16) and dt_rank (None: ceil(dim / 16)).
        img_size: side, or (height, width), of the images for which the position embedding is built.
            Other sizes resize it in two dimensions at run time, files with another grid while
            loading.
        stride: pixels between patches of 16: 16, or 8 for the models fine-tuned on a finer grid.
        out_indices: blocks whose output is returned, ascending.
        feature: 'residual' for the stream after the block, 'mixer' for the block's own
            contribution, as the released tiny segmentor takes it.
        last: what is returned for the last block in mode 'residual': 'add' for the stream,
            'add_norm' for the stream after the final norm, 'none' for the block's contribution.
            None is 'add'.
        pyramid: bring the maps, four or one used four times, to strides 4, 8, 16 and 32 with the
            segmentor's transposed convolutions and pooling.  Without it all maps have the stride of
            the patches; see :class:`mmhybrid.models.necks.SimpleFPN` for detectors.
        class_token: None, or a class token at the position 'middle' or 'first' of the sequence; it
            takes part in the scans and is not returned.
        rope: rotate tokens and stream before each block, as the first release and the detectors do.
        divide: halve the sum of the two directions.  The first release does not.
        dropped_row: which row of a file's position embedding belongs to its class token if this
            model has none: 'middle' is right for the released files; 'first' for those of the first
            release, and for what the released dense loaders make of all files.
        drop_path_rate: stochastic depth rate, growing linearly over the blocks.
        in_channels: channels of the images.
        frozen_stages: -1 freezes nothing, 0 the embedding, k also the first k blocks; frozen parts
            stay in eval mode and need no gradient.
        with_cp: whether to save memory by recomputing blocks in the backward pass; or one flag for
            each block, or the numbers of the blocks where it is done.
        scan_backend: implementation of the scan, see :func:`mmhybrid.ops.selective_scan`.
        lora: None, or settings of low-rank adapters, which learn in place of the weights, such as
            ``dict(rank=8)``; see :class:`mmhybrid.models.lora.Lora`.
        init_cfg: mmengine initialisation; for ``dict(type='Pretrained', checkpoint=path)`` see
            :func:`mmhybrid.models.checkpoints.load_backbone`.

    Attributes:
        out_channels (tuple[int]): channels of each returned map.
        out_strides (tuple[int]): pixels of the image per pixel of each returned map.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value out of range.
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 img_size: int | Sequence[int] = 224,
                 stride: int = 16,
                 out_indices: Sequence[int] = (5, 11, 17, 23),
                 feature: str = 'residual',
                 last: str | None = None,
                 pyramid: bool = True,
                 class_token: str | None = None,
                 rope: bool = False,
                 divide: bool = True,
                 dropped_row: str = 'middle',
                 drop_path_rate: float = 0.1,
                 in_channels: int = 3,
                 frozen_stages: int = -1,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        arch = checked_vim_architecture(arch)
        check_out_indices(out_indices, arch['depth'], '(5, 11, 17, 23)')
        check_flags(pyramid=pyramid)
        if feature not in ('residual', 'mixer'):
            raise ValueError(f"got feature={feature!r}, expected 'residual' or 'mixer'")
        if last not in (None, 'none', 'add', 'add_norm'):
            raise ValueError(f"got last={last!r}, expected 'none', 'add' or 'add_norm'")
        if last is not None and (feature == 'mixer' or out_indices[-1] != arch['depth'] - 1):
            raise ValueError(
                f"got last={last!r}, which acts on the last block's map in mode 'residual' only, "
                f'together with feature={feature!r} and out_indices={tuple(out_indices)}; '
                'leave it out')
        if dropped_row not in ('middle', 'first'):
            raise ValueError(f"got dropped_row={dropped_row!r}, expected 'middle' or 'first'")
        if pyramid and len(out_indices) not in (1, 4):
            raise ValueError(f'got out_indices={tuple(out_indices)}, expected four, or one to be '
                             'used four times; or pyramid=False')
        super().__init__(
            arch, img_size=img_size, stride=stride, class_token=class_token, rope=rope,
            divide=divide, drop_path_rate=drop_path_rate, in_channels=in_channels,
            frozen_stages=frozen_stages, with_cp=with_cp, scan_backend=scan_backend,
            lora=lora, init_cfg=init_cfg)
        self.out_indices = tuple(out_indices)
        self.feature, self.last, self.dropped_row = feature, last or 'add', dropped_row
        dim, count = arch['dim'], len(self.out_indices)
        self.pyramid = pyramid
        self.out_channels = (dim,) * (4 if pyramid else count)
        self.out_strides = (4, 8, 16, 32) if pyramid else (stride,) * count
        # The published segmentor has the final norm whether or not it is used.
        self.norm_f = None
        if pyramid or last == 'add_norm':
            self.norm_f = RMSNorm(dim, eps=1e-5)
        if pyramid:
            for i, level in enumerate(make_pyramid(dim, stride), 1):
                self.add_module(f'fpn{i}', level)
        self.freeze()

    def unused_parts(self):
        """What is there for the names' sake only."""
        yield from self.layers[self.out_indices[-1] + 1:]
        if self.norm_f is not None and self.last != 'add_norm':
            yield self.norm_f

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested blocks.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            Contiguous maps (B, C, H_i, W_i).
        """
        tokens, grid = self.embed(x)
        maps = [self.to_map(t, grid) for t in self.features(tokens, grid)]
        if self.pyramid:
            maps = maps * 4 if len(maps) == 1 else maps
            maps = [getattr(self, f'fpn{i}')(m) for i, m in enumerate(maps, 1)]
        return tuple(maps)

    def features(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Tokens (B, L, C) of the requested blocks."""
        stop = self.out_indices[-1] + 1
        whole = stop == len(self.layers)
        if self.feature == 'mixer':
            outputs = [hidden for _, hidden in self.stream(tokens, grid, stop)]
            return [outputs[i] for i in self.out_indices]
        # The stream after a block is what the next one reads: stochastic depth and rotation of
        # that next block have then acted on it, as in the release.
        streams = []
        for stream, hidden in self.stream(tokens, grid, stop):  # noqa: B007
            streams.append(stream)
        if whole:
            final = hidden if self.last == 'none' else stream + hidden
            streams.append(self.norm_f(final) if self.last == 'add_norm' else final)
        else:
            drop = self.layers[stop].drop_path
            streams.append(self.entering(stream, hidden, self.rotation(grid), drop))
        return [streams[i + 1] for i in self.out_indices]

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit position embedding, class token and rotary tables of a file."""
        return self.adapt_positions(state_dict, self.dropped_row)


def make_pyramid(dim: int, stride: int) -> list[nn.Module]:
    """Modules that bring maps at the stride of the patches to strides 4, 8, 16 and 32."""
    def up() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, 2, stride=2)

    if stride == 8:
        return [nn.Sequential(up()), nn.Identity(), MapPool(2), MapPool(4)]
    return [nn.Sequential(up(), PortableSyncBatchNorm(dim), nn.GELU(), up()), nn.Sequential(up()),
            nn.Identity(), MapPool(2)]
