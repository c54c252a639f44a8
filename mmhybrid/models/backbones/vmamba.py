"""VMamba: a hierarchical backbone of selective scans over the whole map in four directions.

Written from a description of behaviour of the published networks, so that their weights load; from
Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166).

Legend: B images, C channels, H W sides of a map.  Maps are (B, C, H, W) inside the current models
and (B, H, W, C) inside those of the first release; at the border they are always (B, C, H, W).
Whatever the axes are called, the channels of a pixel lie side by side in memory inside.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.families.vmamba import VMAMBA
from mmhybrid.layers import (
    SS2D,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    add_norm,
    decay_rates,
    draw_together,
    drop_path_or_identity,
    dropped,
    map_linear,
    recomputed,
)
from mmhybrid.registry import MODELS

from ..arguments import (
    check_flags,
    check_integers,
    check_number,
    check_out_indices,
    check_rate,
    checked_architecture,
    strict_arguments,
)
from .base import StagedBackbone, checked_recomputation, drop_path_rates, keeps_for_backward

__all__ = ['ARCHITECTURES', 'PatchMerging', 'VMamba', 'VSSBlock', 'VSSStage']

_STAGES = 4
_REQUIRED = VMAMBA.required
_OPTIONAL = VMAMBA.optional
ARCHITECTURES = VMAMBA.architectures


class Permute(nn.Module):
    """Reorder the axes of a map."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Give a view with permuted axes."""
        return x.permute(self.axes)


def _norm(dim: int, channel_first: bool, feeds_linear: bool = False) -> nn.Module:
    if channel_first:
        return LayerNorm2d(dim, feeds_linear=feeds_linear, channels_last=True)
    return LayerNorm(dim, feeds_linear=feeds_linear)


def _conv(*arguments, **options) -> nn.Conv2d:
    """A convolution with its weight as it is read where channels lie side by side."""
    conv = nn.Conv2d(*arguments, **options)
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    return conv


def _to_trunk(channel_first: bool) -> nn.Module:
    return nn.Identity() if channel_first else Permute(0, 2, 3, 1)


def _from_trunk(channel_first: bool) -> nn.Module:
    return nn.Identity() if channel_first else Permute(0, 3, 1, 2)


def make_stem(kind: str, in_channels: int, dim: int, channel_first: bool) -> nn.Sequential:
    """Image (B, in_channels, H, W) to a map at stride 4 in the layout of the trunk.

    Sides become ceil(ceil(n / 2) / 2) with 'v2' (two 3x3 convolutions) and floor(n / 4) with 'v1'
    (one 4x4 convolution).  Child numbers are part of the weights' names.
    """
    enter, leave = _to_trunk(channel_first), _from_trunk(channel_first)
    if kind == 'v1':
        return nn.Sequential(
            _conv(in_channels, dim, 4, stride=4), enter, _norm(dim, channel_first))
    half = dim // 2
    return nn.Sequential(
        _conv(in_channels, half, 3, stride=2, padding=1), enter, _norm(half, channel_first),
        leave, nn.GELU(), _conv(half, dim, 3, stride=2, padding=1), enter,
        _norm(dim, channel_first))


class PatchMerging(nn.Module):
    """Four neighbouring pixels into one of twice the width, as in Swin.

    Args:
        dim: number of channels C.
        channel_first: whether maps are (B, C, H, W) rather than (B, H, W, C).
    """

    def __init__(self, dim: int, channel_first: bool = False):
        super().__init__()
        self.channel_first = channel_first
        self.norm = LayerNorm(4 * dim, feeds_linear=True)
        self.reduction = map_linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the sides of a map, rounding up; odd sides are padded with zeros at their end."""
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # Parities of columns before those of rows: the order of the published weights.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        x = self.reduction(self.norm(x))
        return x.permute(0, 3, 1, 2) if self.channel_first else x


def make_downsample(kind: str, dim: int, channel_first: bool) -> nn.Module:
    """Map of C channels to one of 2C with half the sides, in the layout of the trunk.

    'v1' is patch merging, 'v2' a 2x2 and 'v3' a 3x3 convolution of stride 2.  Sides are rounded up,
    with 'v2' down.
    """
    if kind == 'v1':
        return PatchMerging(dim, channel_first)
    kernel, padding = (3, 1) if kind == 'v3' else (2, 0)
    return nn.Sequential(
        _from_trunk(channel_first), _conv(dim, 2 * dim, kernel, stride=2, padding=padding),
        _to_trunk(channel_first), _norm(2 * dim, channel_first))


class Prepared(NamedTuple):
    """What is computed once for many blocks.

    Attributes:
        rates: decay rates of the scan.
        drop: factors of the mixer's branch, (B,); None where nothing is dropped.
        last_drop: those of the block's last branch.
    """

    rates: Tensor | None = None
    drop: Tensor | None = None
    last_drop: Tensor | None = None


UNPREPARED = Prepared()


def prepare(blocks: Iterable[nn.Module], x: Tensor) -> list[Prepared]:
    """Compute what blocks need in a few calls for all of them; x is any (B, ...) of theirs."""
    blocks = list(blocks)
    rates = decay_rates([block.op.A_logs for block in blocks])
    # A branch each for the mixer and the MLP.
    drops = iter(draw_together(
        [block.drop_path for block in blocks for _ in range(block.branches)], x))
    found = []
    for block, rate in zip(blocks, rates, strict=True):
        own = list(islice(drops, block.branches))
        found.append(Prepared(rate, own[0], own[-1]))
    return found


class VSSBlock(nn.Module):
    """Pre-norm residual block: mixer, then an MLP if there is one.

    Args:
        dim: number of channels C.
        mixer: module that maps a map to one of the same shape.
        mlp_ratio: hidden width of the MLP over C; 0 for no MLP.
        drop_path: stochastic depth rate of both branches.
        channel_first: whether maps are (B, C, H, W) rather than (B, H, W, C).
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.,
                 channel_first: bool = False):
        super().__init__()
        self.norm = _norm(dim, channel_first, feeds_linear=True)
        self.op = mixer
        self.drop_path = drop_path_or_identity(drop_path)
        self.mlp, self.branches = None, 1
        if mlp_ratio:
            self.branches = 2
            self.norm2 = _norm(dim, channel_first, feeds_linear=True)
            self.mlp = Mlp(dim, int(dim * mlp_ratio),
                           linear=partial(map_linear, channel_first=channel_first))

    def forward(self, x: Tensor, ready: Prepared = UNPREPARED, branch: Tensor | None = None,
                drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps of the trunk's layout in and out.

        The last sum of a block is left to the norm of the next one, with which it is one kernel.

        Args:
            x: the residual stream.
            ready: what the network has prepared for this block.
            branch: what the block before this has to add to the stream.
            drop: factors of that branch, (B,).

        Returns:
            Stream and branch for the next block.
        """
        if branch is None:
            y = self.norm(x)
        else:
            x, y = add_norm(x, branch, self.norm, drop=drop)
        branch = self.op(y) if ready.rates is None else self.op(y, ready.rates)
        if self.mlp is not None:
            x, y = add_norm(x, branch, self.norm2, drop=ready.drop)
            branch = self.mlp(y)
        return x, branch


class VSSStage(nn.Module):
    """Blocks on one resolution, and the way to the next.

    Args:
        blocks: the blocks.
        downsample: leads to the next stage; left to the caller.  None for the last stage.
        with_cp: whether to recompute blocks in the backward pass.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None,
                 with_cp: bool = False):
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, ready: Sequence[Prepared] = ()) -> Tensor:
        """Map of the trunk's layout in and out."""
        pending = ()
        for block, own in zip(self.blocks, ready or prepare(self.blocks, x), strict=True):
            again = self.with_cp and keeps_for_backward(block, x)
            inputs = x, own, *pending
            x, branch = recomputed(block, *inputs, draws=False) if again else block(*inputs)
            pending = branch, own.last_drop
        return x + dropped(*pending)


class VSSBackbone(StagedBackbone):
    """Stem, stages and output norms around any mixer; see :class:`VMamba` for the arguments.

    Args:
        arch: complete dictionary.
        make_mixer: gives the mixer for (index of the block in the network, C).
    """

    def __init__(self, arch: dict, make_mixer: Callable[[int, int], nn.Module], *,
                 out_indices, drop_path_rate, in_channels, frozen_stages, with_cp, lora, init_cfg):
        super().__init__(init_cfg=init_cfg, lora=lora)
        check_out_indices(out_indices, _STAGES, '(0, 1, 2, 3)')
        check_rate('drop_path_rate', drop_path_rate)
        check_integers('in_channels', [in_channels], 1)
        check_integers('frozen_stages', [frozen_stages], -1, _STAGES)
        with_cp = checked_recomputation(with_cp, _STAGES)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.channel_first = channel_first = arch['channel_first']
        dims = [arch['dim'] * 2 ** i for i in range(_STAGES)]
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.out_strides = tuple(4 * 2 ** i for i in self.out_indices)

        self.patch_embed = make_stem(arch['stem'], in_channels, dims[0], channel_first)
        self.layers = nn.ModuleList()
        index = 0
        for i, rates in enumerate(drop_path_rates(drop_path_rate, arch['depths'])):
            blocks = []
            for rate in rates:
                blocks.append(VSSBlock(dims[i], make_mixer(index, dims[i]), arch['mlp_ratio'],
                                       rate, channel_first))
                index += 1
            downsample = None
            if i < _STAGES - 1:
                downsample = make_downsample(arch['downsample'], dims[i], channel_first)
            self.layers.append(VSSStage(blocks, downsample, with_cp[i]))
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', LayerNorm2d(dims[i]))
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            Contiguous maps (B, C_i, H_i, W_i).
        """
        x = self.embed(x)
        stages = self.layers[:self.out_indices[-1] + 1]
        ready = iter(prepare((block for stage in stages for block in stage.blocks), x))
        maps = []
        for i, stage in enumerate(stages):
            x = stage(x, list(islice(ready, len(stage.blocks))))
            if i in self.out_indices:
                # the norm is not on the way to the next stage
                maps.append(self.output_norm(i)(
                    x if self.channel_first else x.permute(0, 3, 1, 2)))
            if i < len(stages) - 1:
                x = stage.downsample(x)
        return tuple(maps)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to the map of the first stage, in the trunk's layout."""
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def output_norm(self, stage: int) -> nn.Module:
        """Give the norm of a returned map."""
        return getattr(self, f'outnorm{stage}')

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename entries of the first release; flatten linear weights stored as convolutions."""
        shapes = {name: tensor.dim() for name, tensor in self.state_dict().items()}
        adapted = {}
        for name, tensor in state_dict.items():
            for pattern, replacement in _OLD_NAMES:
                name = re.sub(pattern, replacement, name)
            if shapes.get(name) == 2 and tuple(tensor.shape[2:]) == (1, 1):
                tensor = tensor.flatten(1)
            adapted[name] = tensor
        return adapted


_OLD_NAMES = (
    (r'\Apatch_embed\.proj\.', 'patch_embed.0.'),
    (r'\Apatch_embed\.norm\.', 'patch_embed.2.'),
    (r'\A(layers\.\d+\.blocks\.\d+)\.ln_1\.', r'\1.norm.'),
    (r'\A(layers\.\d+\.blocks\.\d+)\.self_attention\.', r'\1.op.'),
    (r'\Anorm\.', 'classifier.norm.'),
    (r'\Ahead\.', 'classifier.head.'),
)


def checked_vss_architecture(arch: str | dict, known: dict[str, dict], optional: dict) -> dict:
    """Complete and check the ``arch`` of a backbone of this skeleton."""
    arch = checked_architecture(arch, known, _REQUIRED, optional)
    check_integers("arch['dim']", [arch['dim']], 2)
    check_integers("arch['depths']", arch['depths'], 1, length=_STAGES)
    check_integers("arch['state_dim']", [arch['state_dim']], 1)
    check_number("arch['ssm_ratio']", arch['ssm_ratio'], above=0)
    if arch['dt_rank'] is not None:
        check_integers("arch['dt_rank']", [arch['dt_rank']], 1)
    if arch['mlp_ratio'] != 0:
        check_number("arch['mlp_ratio']", arch['mlp_ratio'], above=0)
    check_flags(**{f"arch['{key}']": arch[key] for key in (
        'gate', 'conv_bias', 'channel_first', 'float32_scan')})
    for key, kinds in (('stem', ('v1', 'v2')), ('downsample', ('v1', 'v2', 'v3'))):
        if arch[key] not in kinds:
            raise ValueError(f"got arch['{key}']={arch[key]!r}, expected one of "
                             f"{', '.join(kinds)}")
    return arch


@MODELS.register_module()
@strict_arguments
class VMamba(VSSBackbone):
    """VMamba backbone for dense prediction.

    Takes images (B, in_channels, H, W) of any size and returns a tuple of maps, one per requested
    stage, with ``out_channels`` channels at ``out_strides`` pixels.  Parameter names are those of
    the published weights; names and shapes of the first release are understood too.

    Args:
        arch: tiny (= tiny_s1l8), tiny_s2l5, small (= small_s2l15), small_s1l20, base (=
            base_s2l15), base_s1l20, or v0_tiny, v0_small, v0_base for the gated form of the first
            release; or a dictionary with the keys dim and depths and optionally ssm_ratio (2.0),
            state_dim (1), dt_rank (None: ceil(C / 16)), mlp_ratio (4.0; 0 for no MLP), gate
            (False), conv_bias (False), channel_first (True), stem ('v2'), downsample ('v3') and
            float32_scan (False).
        out_indices: stages whose maps are returned, ascending, 0 to 3.  Stages after the last
            requested one are built, so that weights fit, but neither run nor trained.
        drop_path_rate: stochastic depth rate of the last block, growing linearly from 0 at the
            first.  Published: 0.2 (tiny), 0.3 (small), 0.6 (base).
        in_channels: channels of the images.
        frozen_stages: -1 freezes nothing, 0 the stem, k also the first k stages; frozen parts stay
            in eval mode and need no gradient.  Output norms are never frozen.
        with_cp: whether to save memory by recomputing blocks in the backward pass; or one flag for
            each stage, or the numbers of the stages where it is done.
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
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.2,
                 in_channels: int = 3,
                 frozen_stages: int = -1,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        arch = checked_vss_architecture(arch, ARCHITECTURES, _OPTIONAL)

        def mixer(index: int, dim: int) -> SS2D:
            return SS2D(dim, state_dim=arch['state_dim'], ratio=arch['ssm_ratio'],
                        dt_rank=arch['dt_rank'], gate=arch['gate'], conv_bias=arch['conv_bias'],
                        channel_first=arch['channel_first'], float32_scan=arch['float32_scan'],
                        backend=scan_backend)

        super().__init__(arch, mixer, out_indices=out_indices, drop_path_rate=drop_path_rate,
                         in_channels=in_channels, frozen_stages=frozen_stages, with_cp=with_cp,
                         lora=lora, init_cfg=init_cfg)
