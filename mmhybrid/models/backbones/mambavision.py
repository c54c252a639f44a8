"""MambaVision: a hierarchical backbone of convolutions, selective scans and windowed attention.

Written from a description of behaviour of the published networks, so that their weights load; from
Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone" (2024).

Legend: B images, C channels, H W sides of a map, L tokens of a window.  Maps are (B, C, H, W)
between stages, tokens are (B * windows, L, C) inside stages 3 and 4.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmhybrid.families.mambavision import MAMBAVISION
from mmhybrid.layers import (
    Attention,
    ConvBlock,
    ConvStem,
    Downsample,
    LayerNorm,
    LayerNorm2d,
    MambaVisionMixer,
    Mlp,
    add_norm,
    draw_together,
    drop_path_or_identity,
    dropped,
    exporting,
    near_equal,
    window_partition,
    window_unpartition,
    windows_along,
)
from mmhybrid.layers.mixers.mambavision import BRANCHES
from mmhybrid.registry import MODELS

from ..arguments import (
    check_choice,
    check_flags,
    check_integers,
    check_number,
    check_out_indices,
    check_rate,
    checked_architecture,
    strict_arguments,
)
from .base import StagedBackbone, checked_recomputation, drop_path_rates, run_blocks

__all__ = ['ARCHITECTURES', 'PATTERNS', 'ConvStage', 'HybridBlock', 'HybridStage', 'MambaVision',
           'attention_blocks']

# Windows are those of the classification networks; dense recipes give larger ones.  Only the last
# two windows and head counts are used: stages 1 and 2 are convolutional.
ARCHITECTURES = MAMBAVISION.architectures
_REQUIRED = MAMBAVISION.required
_OPTIONAL = MAMBAVISION.optional
_STAGES = 4
_Drops = tuple[Tensor | None, Tensor | None]  # factors of a block's branches


class HybridBlock(nn.Module):
    """Pre-norm residual block: token mixer, then MLP.

    Args:
        dim: C, token width.
        mixer: module that maps (B, L, C) to the same shape.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: stochastic depth rate of both branches.
        layer_scale: initial value of the per-channel factors on both branches; None for no factors.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4, drop_path: float = 0.,
                 layer_scale: float | None = None):
        super().__init__()
        if layer_scale is None:
            self.gamma_1 = self.gamma_2 = None
        else:
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.norm1 = LayerNorm(dim, feeds_linear=True)
        self.mixer = mixer
        self.norm2 = LayerNorm(dim, feeds_linear=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, x: Tensor, kept: Callable[[Tensor], Tensor] | None = None,
                normed: Tensor | None = None, following: nn.Module | None = None,
                drops: Sequence[Tensor | None] = (None, None)) -> Tensor | tuple[Tensor, Tensor]:
        """Mix tokens, then channels; drop path acts per entry of the first axis.

        Args:
            x: (B, L, C).
            kept: see :class:`mmhybrid.layers.Attention`, which the mixer then must be.
            normed: ``norm1(x)``, where that is known.
            following: the norm that reads the result, to be computed together with it.
            drops: factors (B,) of both branches, where they were drawn before.

        Returns:
            (B, L', C), the kept tokens; with ``following`` a pair of them and their norm.
        """
        if normed is None:
            normed = self.norm1(x)
        if kept is None:
            y = self.mixer(normed)
        else:
            y, x = self.mixer(normed, kept), kept(x)
        first, second = (self.drop_path if drop is None else drop for drop in drops)
        x, normed = add_norm(x, y, self.norm2, self.gamma_1, first)
        y = self.mlp(normed)
        if following is not None:
            return add_norm(x, y, following, self.gamma_2, second)
        return x + dropped(y if self.gamma_2 is None else self.gamma_2 * y, second)


class ConvStage(nn.Module):
    """Convolutional blocks on a map (stages 1 and 2).

    Args:
        dim: number of channels C.
        drop_paths: one stochastic depth rate per block.
        downsample: whether the stage owns the convolution that leads to the next stage.
        with_cp: whether to recompute blocks in the backward pass.
    """

    def __init__(self, dim: int, drop_paths: Sequence[float], downsample: bool = True,
                 with_cp: bool = False):
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(ConvBlock(dim, rate) for rate in drop_paths)
        self.downsample = Downsample(dim, 2 * dim) if downsample else None

    def branches(self, batch: int, size: tuple[int, int]) -> list[tuple[nn.Module, int]]:
        """Drop paths, and how many entries each one decides about, for maps of (H, W)."""
        return [(block.drop_path, batch) for block in self.blocks]

    def forward(self, x: Tensor, drops: Sequence[Tensor | None] | None = None) -> Tensor:
        """Shape (B, C, H, W) in and out; ``downsample`` is left to the caller.

        Args:
            x: the map.
            drops: factors of the ``branches``; None to draw them here.
        """
        if drops is None:
            (drops,) = _drawn([self], x)
        for block, drop in zip(self.blocks, drops, strict=True):
            x = run_blocks([block], x, self.with_cp, drop)
        return x


#: Where a stage has attention in place of a scan, as the paper's ablation names it.
PATTERNS = ('last-half', 'first-half', 'last-quarter', 'attention-first', 'scan-first', 'random')


def attention_blocks(pattern: str, depth: int) -> set[int]:
    """Indices of a stage's attention blocks.

    Args:
        pattern: 'last-half' (MMMMSSSS with M for scan and S for attention), 'first-half'
            (SSSSMMMM), 'last-quarter' (MMMMMMSS), 'attention-first' (SMSMSMSM), 'scan-first'
            (MSMSMSMS), or 'random' for half of the blocks, drawn once for each depth.
        depth: number of blocks; of an odd number the half is rounded down.

    Raises:
        ValueError: for another pattern.
    """
    half = depth // 2
    chosen = {
        'last-half': range(depth - half, depth),
        'first-half': range(half),
        'last-quarter': range(depth - depth // 4, depth),
        'attention-first': range(0, 2 * half, 2),
        'scan-first': range(1, depth, 2),
        'random': random.Random(100 + depth).sample(range(depth), half),
    }
    check_choice('pattern', pattern, PATTERNS)
    return set(chosen[pattern])


class HybridStage(nn.Module):
    """Blocks on windows of tokens: scans in the first half, attention in the second.

    The map is cut once; windows exchange nothing until the stage ends.  With an odd number of
    blocks there is one scan block more.

    Args:
        dim: number of channels C.
        num_heads: heads of the attention blocks.
        window: side of a window in pixels of this stage's map.
        drop_paths: one stochastic depth rate per block.
        tight: whether windows are cut to fit the map, so that nothing is padded.
        mlp_ratio: hidden width of the MLPs over C.
        layer_scale: see :class:`HybridBlock`.
        downsample: whether the stage owns the convolution that leads to the next stage.
        with_cp: whether to recompute blocks in the backward pass.
        mixer: keyword arguments of :class:`mmhybrid.layers.MambaVisionMixer`.
        pattern: which blocks are attention, see :func:`attention_blocks`.
    """

    def __init__(self, dim: int, num_heads: int, window: int, drop_paths: Sequence[float],
                 tight: bool = False, mlp_ratio: float = 4, layer_scale: float | None = None,
                 downsample: bool = True, with_cp: bool = False, mixer: dict | None = None,
                 pattern: str = 'last-half'):
        super().__init__()
        self.window = window
        self.tight = tight
        self.with_cp = with_cp
        attention = attention_blocks(pattern, len(drop_paths))
        self.blocks = nn.ModuleList(
            HybridBlock(
                dim,
                Attention(dim, num_heads) if j in attention
                else MambaVisionMixer(dim, **mixer or {}),
                mlp_ratio, rate, layer_scale)
            for j, rate in enumerate(drop_paths))
        self.downsample = Downsample(dim, 2 * dim) if downsample else None

    def branches(self, batch: int, size: tuple[int, int]) -> list[tuple[nn.Module, int]]:
        """Drop paths, and how many entries each one decides about, for maps of (H, W)."""
        down, across = (windows_along(side, self.window) for side in size)
        return [(block.drop_path, batch * down * across) for block in self.blocks for _ in range(2)]

    def forward(self, x: Tensor, drops: Sequence[Tensor | None] | None = None) -> Tensor:
        """Shape (B, C, H, W) in and out; ``downsample`` is left to the caller.

        Args:
            x: the map.
            drops: factors of the ``branches``; None to draw them here.
        """
        if drops is None:
            (drops,) = _drawn([self], x)
        pairs = list(zip(drops[::2], drops[1::2], strict=True))
        return self._tight(x, pairs) if self.tight else self._padded(x, pairs)

    def _tight(self, x: Tensor, drops: Sequence[_Drops]) -> Tensor:
        """Windows of nearly equal size, the equal ones together: windows exchange nothing."""
        rows, columns = (near_equal(side, self.window) for side in x.shape[-2:])

        handed = _Handed(drops)

        def run(part: Tensor, window: tuple[int, int]) -> Tensor:
            tokens = window_partition(part, window)
            tokens = self._mix(self.blocks, tokens, handed.next(len(tokens)))
            return window_unpartition(tokens, window, tuple(part.shape[-2:]))

        heights, widths = ([number * side for number, side in cut] for cut in (rows, columns))
        return _patchwork(_cut(x, heights, widths, 2), rows, columns, run)

    def _padded(self, x: Tensor, drops: Sequence[_Drops]) -> Tensor:
        """Windows of one size; of their padding only what reaches the map is computed."""
        w, (H, W) = self.window, x.shape[-2:]
        last = self.blocks[-1]
        tokens = window_partition(x, w)
        whole = exporting() or H % w == W % w == 0
        if whole or len(self.blocks) == 1 or not isinstance(last.mixer, Attention):
            return window_unpartition(self._mix(self.blocks, tokens, drops), w, (H, W))
        pair = self._mix(self.blocks[:-1], tokens, drops[:-1], last.norm1)
        handed = _Handed(drops[-1:])

        def run(part: tuple[Tensor, ...], real: tuple[int, int]) -> Tensor:
            kept = partial(_corner, window=w, real=real)
            _, down, across = part[0].shape[:3]
            tokens, normed = (*(t.flatten(0, 2) for t in part), None)[:2]
            (own,) = handed.next(len(tokens))
            y = run_blocks([last], tokens, self.with_cp, kept, normed, None, own)
            return window_unpartition(y, real, (down * real[0], across * real[1]))

        rows, columns = ([(n, r) for n, r in ((side // w, w), (1, side % w)) if n and r]
                         for side in (H, W))
        heights, widths = ([number for number, _ in cut] for cut in (rows, columns))
        grids = [_cut(t.unflatten(0, (-1, windows_along(H, w), windows_along(W, w))),
                      heights, widths, 1) for t in pair if t is not None]
        parts = [list(zip(*bands, strict=True)) for bands in zip(*grids, strict=True)]
        return _patchwork(parts, rows, columns, run)

    def _mix(self, blocks: Sequence[HybridBlock], tokens: Tensor, drops: Sequence[_Drops],
             following: nn.Module | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """Apply blocks in order, each together with the norm that reads its result.

        Args:
            blocks: at least one.
            tokens: (B, L, C).
            drops: of each block.
            following: the norm behind the last of them.

        Returns:
            (B, L, C); with ``following`` a pair of them and their norm, or None in its place where
            the block behind it is to be computed again from its tokens alone.
        """
        if self.with_cp and torch.is_grad_enabled():
            for block, own in zip(blocks, drops, strict=True):
                tokens = run_blocks([block], tokens, True, None, None, None, own)
            return tokens if following is None else (tokens, None)
        normed, norms = None, [*(b.norm1 for b in blocks[1:]), following]
        for block, own, norm in zip(blocks, drops, norms, strict=True):
            tokens = block(tokens, None, normed, norm, own)
            if norm is not None:
                tokens, normed = tokens
        return tokens if following is None else (tokens, normed)


class _Handed:
    """Hands the factors of a stage's windows out to its parts, one after the other."""

    def __init__(self, drops: Sequence[_Drops]):
        self._drops, self._start = drops, 0

    def next(self, count: int) -> list[_Drops]:
        """Those of the next ``count`` windows."""
        start, self._start = self._start, self._start + count
        return [tuple(None if drop is None else drop[start:self._start] for drop in pair)
                for pair in self._drops]


def _drawn(stages: Sequence[ConvStage | HybridStage], x: Tensor) -> list[list[Tensor | None]]:
    """Factors of the drop paths of stages that follow each other, from one draw for all of them.

    Args:
        stages: the first one reads x, and each further one a map of half the sides, rounded up.
        x: (B, C, H, W).
    """
    (batch, _, *size), branches = x.shape, []
    for stage in stages:
        branches.append(stage.branches(batch, tuple(size)))
        size = [-(-side // 2) for side in size]
    paths, sizes = zip(*chain.from_iterable(branches), strict=True)
    drawn = iter(draw_together(paths, x, sizes))
    return [list(islice(drawn, len(own))) for own in branches]


def _cut(x: Tensor, heights: list[int], widths: list[int], axis: int) -> list[list[Tensor]]:
    """Parts of a map whose rows are ``axis``; nothing to put together again where it is one."""
    bands = [x] if len(heights) == 1 else x.split(heights, axis)
    return [[band] if len(widths) == 1 else list(band.split(widths, axis + 1)) for band in bands]


def _corner(tokens: Tensor, window: int, real: tuple[int, int]) -> Tensor:
    """The upper left tokens of square windows: (B, window^2, ...) to (B, height * width, ...)."""
    down, across = (side - window for side in real)
    # negative padding: one copy, and one again of its gradient
    padding = (0, 0) * (tokens.dim() - 2) + (0, across, 0, down)
    return F.pad(tokens.unflatten(1, (window, window)), padding).flatten(1, 2)


def _patchwork(parts: list[list], rows: list[tuple[int, int]],
               columns: list[tuple[int, int]], run: Callable) -> Tensor:
    """One map of what ``run`` makes of each part and of the sides of the windows in it."""
    maps = [[run(part, (height, width)) for part, (_, width) in zip(band, columns, strict=True)]
            for band, (_, height) in zip(parts, rows, strict=True)]
    bands = [band[0] if len(band) == 1 else torch.cat(band, 3) for band in maps]
    return bands[0] if len(bands) == 1 else torch.cat(bands, 2)


@MODELS.register_module()
@strict_arguments
class MambaVision(StagedBackbone):
    """MambaVision backbone for dense prediction.

    Takes images (B, in_channels, H, W) of any size and returns a tuple of maps, one per requested
    stage, with ``out_channels`` channels at ``out_strides`` pixels.  Parameter names are those of
    the published weights.

    Args:
        arch: one of tiny, tiny2, small, base, large, large2, large3, or a dictionary with the keys
            dim, stem_width, depths, num_heads, window_size and optionally mlp_ratio (4) and
            layer_scale (None).  Lists have one entry per stage.
        window_size: four window sides in pixels of the stages' maps, the first two unused; None for
            those of ``arch``.  Maps are padded with zeros to multiples of the window, and padding
            takes part as ordinary tokens, so the sides change the result.
        windows: 'published' for windows as above, which released weights were trained with, or
            'tight' for windows that fit the map: as few as have no more than those sides, of nearly
            equal sizes, without padding.  A map that one window holds is then one window, and
            ``window_size`` does not change the result.
        out_indices: stages whose maps are returned, ascending, 0 to 3.  Stages after the last
            requested one are built, so that weights fit, but neither run nor trained.
        drop_path_rate: stochastic depth rate of the last block, growing linearly from 0 at the
            first.  0.2 is what the published dense models were trained with.  In stages 3 and 4
            each window is dropped by itself.
        layer_scale: initial value of the per-channel factors of stages 3 and 4, None for no
            factors, or 'arch' for the choice of ``arch``.
        in_channels: channels of the images.
        frozen_stages: -1 freezes nothing, 0 the stem, k also the first k stages; frozen parts stay
            in eval mode and need no gradient.  Output norms are never frozen.
        norm_eval: whether BatchNorm layers use and keep their running statistics in training.
        with_cp: whether to save memory by recomputing blocks in the backward pass; or one flag for
            each stage, or the numbers of the stages where it is done.
        out_norm: norm of each output: 'ln2d' (or True) for LayerNorm over channels, 'bn' for
            BatchNorm, None (or False) for none.
        scan_backend: implementation of the scan, see :func:`mmhybrid.ops.selective_scan`.
        fused_mixer: whether scan blocks use fused kernels: True, False, or 'auto' for where the
            scan runs in Triton, see :class:`mmhybrid.layers.MambaVisionMixer`.
        lean_mixer: whether those kernels keep less memory for the backward pass and compute more.
        causal_mixer: whether scan blocks convolve causally before the scan, as Mamba does.  This
            and the next two are settings of the paper's ablations; published weights need their
            defaults.
        mixer_branch: second branch of the scan blocks: 'concat', 'gate', 'linear-gate' or 'none',
            see :class:`mmhybrid.layers.MambaVisionMixer`.
        pattern: which blocks of stages 3 and 4 are attention: 'last-half', 'first-half',
            'last-quarter', 'attention-first', 'scan-first' or 'random', see
            :func:`attention_blocks`.
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

    Examples:
        >>> maps = MambaVision('tiny', window_size=(8, 8, 64, 32))(torch.rand(1, 3, 511, 511))
        >>> [tuple(m.shape) for m in maps]
        [(1, 80, 128, 128), (1, 160, 64, 64), (1, 320, 32, 32), (1, 640, 16, 16)]
    """

    stages_name = 'levels'
    # Only one of the classification, dense and un-normed forms has these.
    may_differ = r'(outnorm\d|norm|head)\.'

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 window_size: Sequence[int] | None = None,
                 windows: str = 'published',
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.2,
                 layer_scale: float | str | None = 'arch',
                 in_channels: int = 3,
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 out_norm: str | bool | None = 'ln2d',
                 scan_backend: str = 'auto',
                 fused_mixer: bool | str = 'auto',
                 lean_mixer: bool = False,
                 causal_mixer: bool = False,
                 mixer_branch: str = 'concat',
                 pattern: str = 'last-half',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg, lora=lora)
        arch = _checked_architecture(arch)
        if window_size is None:
            window_size = arch['window_size']
        check_integers('window_size', window_size, 1, length=_STAGES)
        check_choice('windows', windows, ('published', 'tight'))
        check_out_indices(out_indices, _STAGES, '(0, 1, 2, 3)')
        check_rate('drop_path_rate', drop_path_rate)
        if layer_scale == 'arch':
            layer_scale = arch['layer_scale']
        _check_layer_scale(layer_scale)
        check_integers('in_channels', [in_channels], 1)
        check_integers('frozen_stages', [frozen_stages], -1, _STAGES)
        with_cp = checked_recomputation(with_cp, _STAGES)
        check_flags(norm_eval=norm_eval, lean_mixer=lean_mixer, causal_mixer=causal_mixer)
        check_choice('mixer_branch', mixer_branch, BRANCHES)
        check_choice('pattern', pattern, PATTERNS)

        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.window_size = tuple(window_size)
        dims = [arch['dim'] * 2 ** i for i in range(_STAGES)]
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.out_strides = tuple(4 * 2 ** i for i in self.out_indices)

        self.patch_embed = ConvStem(in_channels, arch['stem_width'], arch['dim'])
        self.levels = nn.ModuleList()
        mixer = dict(backend=scan_backend, fused=fused_mixer, lean=lean_mixer,
                     causal=causal_mixer, branch=mixer_branch)
        rates_of = drop_path_rates(drop_path_rate, arch['depths'])
        for i, (dim, rates) in enumerate(zip(dims, rates_of, strict=True)):
            shared = dict(downsample=i < _STAGES - 1, with_cp=with_cp[i])
            if i < 2:
                self.levels.append(ConvStage(dim, rates, **shared))
            else:
                self.levels.append(HybridStage(
                    dim, arch['num_heads'][i], window_size[i], rates, windows == 'tight',
                    arch['mlp_ratio'], layer_scale, mixer=mixer, pattern=pattern, **shared))
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', _output_norm(out_norm, dims[i]))
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            Contiguous maps (B, C_i, H_i, W_i); each stride halves the sides, rounding up.
        """
        x = self.patch_embed(x)
        stages, maps = self.levels[:self.out_indices[-1] + 1], []
        for i, (stage, drops) in enumerate(zip(stages, _drawn(stages, x), strict=True)):
            x = stage(x, drops)
            if i in self.out_indices:
                # the norm is not on the way to the next stage
                maps.append(getattr(self, f'outnorm{i}')(x).contiguous())
            if i < len(stages) - 1:
                x = stage.downsample(x)
        return tuple(maps)

    def train(self, mode: bool = True) -> MambaVision:
        """Switch the mode; frozen stages and, with ``norm_eval``, BatchNorm stay in eval mode."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def _checked_architecture(arch: str | dict) -> dict:
    arch = checked_architecture(arch, ARCHITECTURES, _REQUIRED, _OPTIONAL)
    for key in ('dim', 'stem_width'):
        check_integers(f"arch['{key}']", [arch[key]], 1)
    for key in ('depths', 'num_heads', 'window_size'):
        check_integers(f"arch['{key}']", arch[key], 1, length=_STAGES)
    check_number("arch['mlp_ratio']", arch['mlp_ratio'], above=0)
    _check_layer_scale(arch['layer_scale'])
    return arch


def _output_norm(kind: str | bool | None, dim: int) -> nn.Module:
    if kind is True or kind == 'ln2d':
        return LayerNorm2d(dim)
    if kind == 'bn':
        return nn.BatchNorm2d(dim)
    if kind is False or kind is None:
        return nn.Identity()
    raise ValueError(f"got out_norm={kind!r}, expected 'ln2d', 'bn' or None")


def _check_layer_scale(value: float | None) -> None:
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
        raise TypeError(f"got layer_scale={value!r}, expected a number, None (no factors) or "
                        "'arch' (as the architecture has it)")
