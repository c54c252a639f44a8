"""LocalVim: a plain backbone with windowed scan directions, chosen per block.

Written from a description of behaviour of the published networks, so that their weights load; from
Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
2403.09338).
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from mmhybrid.families.localvim import LOCALVIM
from mmhybrid.layers import LayerNorm, LocalVimMixer, RMSNorm
from mmhybrid.registry import MODELS

from ..arguments import check_integers, check_out_indices, checked_architecture, strict_arguments
from .local_directions import LOCAL_VIM, ColumnRestore, resolve_directions
from .plain import PlainBackbone

__all__ = ['ARCHITECTURES', 'LocalVim', 'LocalVimTrunk']

ARCHITECTURES = LOCALVIM.architectures
_REQUIRED = LOCALVIM.required
_OPTIONAL = LOCALVIM.optional
_NORMS = {'ln': LayerNorm, 'rms': RMSNorm}


class LocalVimTrunk(ColumnRestore, PlainBackbone):
    """Tokens and blocks of LocalVim; see :class:`LocalVim` for the arguments."""

    # LayerNorms of the dense form start from the weights of the RMSNorms of classification files.
    may_differ = r'(norm_f|head|rope|outnorm_\d+)\.|cls_token|layers\.\d+\.norm\.bias'

    def __init__(self, arch: str | dict, *, directions, v_restore, norm, img_size, class_token,
                 rope, drop_path_rate, in_channels, frozen_stages, with_cp, scan_backend, lora,
                 init_cfg, attention):
        arch = checked_architecture(arch, ARCHITECTURES, _REQUIRED, _OPTIONAL)
        check_integers("arch['dim']", [arch['dim']], 4)
        if arch['dim'] % 4:
            raise ValueError(f"got arch['dim']={arch['dim']}, expected a multiple of 4")
        check_integers("arch['depth']", [arch['depth']], 1)
        check_integers("arch['state_dim']", [arch['state_dim']], 1)
        if arch['dt_rank'] is not None:
            check_integers("arch['dt_rank']", [arch['dt_rank']], 1)
        if norm not in _NORMS:
            raise ValueError(f"got norm={norm!r}, expected 'ln' or 'rms'")
        chosen = resolve_directions(directions, arch['depth'], LOCAL_VIM)
        mixers = [
            LocalVimMixer(arch['dim'], names, class_token=class_token is not None,
                          v_restore=v_restore, state_dim=arch['state_dim'],
                          dt_rank=arch['dt_rank'], depth=arch['depth'], backend=scan_backend,
                          attention=attention)
            for names in chosen]
        make_norm = partial(_NORMS[norm], eps=1e-5, feeds_linear=True)
        super().__init__(
            mixers, arch['dim'], make_norm, img_size=img_size, stride=16, class_token=class_token,
            rope=rope, interpolate_rope=True, drop_path_rate=drop_path_rate,
            in_channels=in_channels, frozen_stages=frozen_stages, with_cp=with_cp,
            lora=lora, init_cfg=init_cfg)
        self.directions, self.v_restore = chosen, v_restore
        self.dim = arch['dim']

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, in_channels, H, W) to tokens (B, L, C) with positions, and their grid."""
        tokens, grid = super().embed(x)
        self.tell_restore(*grid)
        return tokens, grid

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit position embedding, class token and rotary tables of a file."""
        return self.adapt_positions(state_dict, 'middle')


@MODELS.register_module()
@strict_arguments
class LocalVim(LocalVimTrunk):
    """LocalVim backbone for dense prediction.

    Takes images (B, in_channels, H, W) of any size and returns a tuple of maps at stride 16, one
    per requested block.  Images are padded with zeros on the right and at the bottom to whole
    patches.  Parameter names are those of the published weights.

    Args:
        arch: tiny or small, or a dictionary with the keys dim and depth and optionally state_dim
            (16) and dt_rank (None: ceil(dim / 16)).
        directions: 'searched' for the published directions, 'unsearched', one list of names per
            block, or None for all eight in learned shares (to search).  Files cannot tell which
            directions they were trained with.
        v_restore: 'exact', or 'released' for what the published code computes: it puts results of
            the column scans on wrong tokens unless the map is square.
        norm: norm before each mixer: 'ln' as the dense configs have it, although their weights come
            from classification with 'rms'.
        img_size: side, or (height, width), of the images for which position embedding and rotary
            tables are built.  Other sizes resize them in two dimensions at run time, files with
            another grid while loading.
        out_indices: blocks whose mixer output is returned, ascending.
        rope: rotate tokens and stream before each block.
        drop_path_rate: stochastic depth rate, growing linearly over the blocks.
        in_channels: channels of the images.
        frozen_stages: -1 freezes nothing, 0 the embedding, k also the first k blocks; frozen parts
            stay in eval mode and need no gradient.  Output norms are never frozen.
        with_cp: whether to save memory by recomputing blocks in the backward pass; or one flag for
            each block, or the numbers of the blocks where it is done.
        scan_backend: implementation of the scan, see :func:`mmhybrid.ops.selective_scan`.
        attention: what each direction goes through before the sum: 'channel' as in the published
            networks, 'channel-spatial' as in the paper (scaling tokens too), or 'none'.
        lora: None, or settings of low-rank adapters, which learn in place of the weights, such as
            ``dict(rank=8)``; see :class:`mmhybrid.models.lora.Lora`.
        init_cfg: mmengine initialisation; for ``dict(type='Pretrained', checkpoint=path)`` see
            :func:`mmhybrid.models.checkpoints.load_backbone`.

    Attributes:
        out_channels (tuple[int]): channels of each returned map.
        out_strides (tuple[int]): pixels of the image per pixel of each returned map.
        directions (list): names per block, None where they are searched.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value out of range.
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 directions: str | Sequence[Sequence[str]] | None = 'searched',
                 v_restore: str = 'exact',
                 norm: str = 'ln',
                 img_size: int | Sequence[int] = 224,
                 out_indices: Sequence[int] = (4, 9, 14, 19),
                 rope: bool = True,
                 drop_path_rate: float = 0.1,
                 in_channels: int = 3,
                 frozen_stages: int = -1,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 attention: str = 'channel',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(
            arch, directions=directions, v_restore=v_restore, norm=norm, img_size=img_size,
            class_token=None, rope=rope, drop_path_rate=drop_path_rate, in_channels=in_channels,
            frozen_stages=frozen_stages, with_cp=with_cp, scan_backend=scan_backend,
            attention=attention, lora=lora, init_cfg=init_cfg)
        check_out_indices(out_indices, len(self.layers), '(4, 9, 14, 19)')
        self.out_indices = tuple(out_indices)
        self.out_channels = (self.dim,) * len(self.out_indices)
        self.out_strides = (16,) * len(self.out_indices)
        for j in range(len(self.out_indices)):
            self.add_module(f'outnorm_{j}', LayerNorm(self.dim))
        self.freeze()

    def unused_parts(self):
        """Blocks after the last requested one."""
        yield from self.layers[self.out_indices[-1] + 1:]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested blocks.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            Contiguous maps (B, C, ceil(H / 16), ceil(W / 16)).
        """
        tokens, grid = self.embed(x)
        outputs = [hidden for _, hidden in self.stream(tokens, grid, self.out_indices[-1] + 1)]
        return tuple(
            self.to_map(getattr(self, f'outnorm_{j}')(outputs[i]), grid)
            for j, i in enumerate(self.out_indices))
