"""Plain backbones: tokens of one resolution, position embedding, a stream of mixer blocks.

Shared by Vim and LocalVim.  Legend: B images, C token width, L tokens, h w token grid.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.layers import (
    Rope2d,
    add_norm,
    draw_together,
    drop_path_or_identity,
    dropped,
    prepare_mixers,
    recomputed,
    resize_grid,
    rotated_sum,
)

from ..arguments import check_flags, check_integers, check_rate
from .base import DenseBackbone, checked_recomputation, keeps_for_backward

__all__ = ['MixerBlock', 'PatchEmbed', 'PlainBackbone', 'class_row_of']

# The share of a normal distribution's spread that is left when it is cut at two sigma.
_CUT_SPREAD = 0.87962566103423978


class PatchEmbed(nn.Module):
    """Overlapping or adjacent patches to tokens.

    Args:
        in_channels: channels of the images.
        dim: number of channels C.
        patch: side of a patch in pixels.
        stride: pixels between patches.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, stride: int):
        super().__init__()
        self.patch, self.stride = patch, stride
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=stride)
        std = math.sqrt(1 / self.proj.weight[0].numel()) / _CUT_SPREAD
        nn.init.trunc_normal_(self.proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.proj.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image."""
        return tuple(max(math.ceil((n - self.patch) / self.stride), 0) + 1
                     for n in (height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to a map (B, C, h, w); zeros fill the last patches."""
        missing = [(g - 1) * self.stride + self.patch - n
                   for g, n in zip(self.grid(*x.shape[-2:]), x.shape[-2:], strict=True)]
        if any(n > 0 for n in missing):
            x = F.pad(x, (0, max(missing[1], 0), 0, max(missing[0], 0)))
        return self.proj(x)


class MixerBlock(nn.Module):
    """Norm and mixer of a stream of tokens.

    Args:
        mixer: see :func:`mmhybrid.layers.prepare_mixers`.
        norm: norm over C.
        drop_path: stochastic depth rate of what comes in.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = drop_path_or_identity(drop_path)

    def forward(self, stream: Tensor, grid: tuple[int, int], prepared: tuple | None = None,
                hidden: Tensor | None = None, drop: Tensor | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, L, C) to what the mixer makes of them.

        Args:
            stream: the tokens, or what they are before ``hidden`` is added.
            grid: (H, W) of their map.
            prepared: of the mixer.
            hidden: what the block before made.
            drop: factors (B,) of ``hidden``.

        Returns:
            What the mixer makes; with ``hidden`` the sum before it.
        """
        if hidden is None:
            return self.mixer(self.norm(stream), grid, prepared)
        stream, normed = add_norm(stream, hidden, self.norm, drop=drop)
        return stream, self.mixer(normed, grid, prepared)


class PlainBackbone(DenseBackbone):
    """Trunk of a plain backbone.

    Args:
        mixers: one per block, in order.
        dim: number of channels C.
        norm: makes a norm over C.
        img_size: (height, width) of the images for which position embedding and rotary tables are
            built; other sizes resize them.
        stride: pixels between patches of 16.
        class_token: None, 'first' or 'middle'.
        rope: whether tokens and stream are rotated before each block.
        interpolate_rope: see :class:`mmhybrid.layers.rope.Rope2d`.
        drop_path_rate: of the last block's output; that of block i is dropped by block i + 1.
    """

    def __init__(self, mixers: Sequence[nn.Module], dim: int, norm: Callable[[int], nn.Module], *,
                 img_size, stride, class_token, rope, interpolate_rope, drop_path_rate,
                 in_channels, frozen_stages, with_cp, lora, init_cfg):
        super().__init__(init_cfg=init_cfg, lora=lora)
        img_size = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
        if len(img_size) != 2:
            raise ValueError(f'got img_size={img_size}, expected one side or (height, width)')
        check_integers('img_size', img_size, 16)
        check_rate('drop_path_rate', drop_path_rate)
        check_integers('in_channels', [in_channels], 1)
        check_integers('frozen_stages', [frozen_stages], -1, len(mixers))
        with_cp = checked_recomputation(with_cp, len(mixers), 'block')
        check_flags(rope=rope)
        if class_token not in (None, 'first', 'middle'):
            raise ValueError(f"got class_token={class_token!r}, expected None, 'first' or 'middle'")
        self.frozen_stages, self.with_cp = frozen_stages, with_cp
        self.class_position = class_token
        self.patch_embed = PatchEmbed(in_channels, dim, 16, stride)
        self.grid = self.patch_embed.grid(*img_size)
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        else:
            self.cls_token = None
        tokens = self.grid[0] * self.grid[1] + (class_token is not None)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.rope = Rope2d(dim, self.grid, interpolate_rope) if rope else None
        last = max(len(mixers) - 1, 1)
        self.layers = nn.ModuleList(
            MixerBlock(mixer, norm(dim), drop_path_rate * max(i - 1, 0) / last)
            for i, mixer in enumerate(mixers))

    # --- conduct of all backbones ---

    def frozen_parts(self) -> Iterable[nn.Module | nn.Parameter]:
        """The embedding and the first ``frozen_stages`` blocks."""
        if self.frozen_stages >= 0:
            yield self.patch_embed
            yield self.pos_embed
            if self.cls_token is not None:
                yield self.cls_token
            yield from self.layers[:self.frozen_stages]

    def depth_of(self, name: str) -> int | None:
        """Count blocks."""
        parts = name.split('.')
        if parts[0] in ('patch_embed', 'pos_embed', 'cls_token'):
            return 0
        return int(parts[1]) + 1 if parts[0] == 'layers' else None

    @property
    def num_depths(self) -> int:
        """Embedding, blocks, and what follows them."""
        return len(self.layers) + 2

    # --- forward ---

    def class_index(self, grid: tuple[int, int]) -> int | None:
        """Index of the class token in the sequence."""
        middle = grid[0] * grid[1] // 2
        return {None: None, 'first': 0, 'middle': middle}[self.class_position]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, in_channels, H, W) to tokens (B, L, C) with positions, and their grid."""
        x = self.patch_embed(x)
        grid = tuple(x.shape[-2:])
        tokens, index = x.flatten(2).mT, self.class_index(grid)
        if index is not None:
            cls = self.cls_token.expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :index], cls, tokens[:, index:]], dim=1)
        # the first one says how the sum lies: channels side by side
        return self.positions(grid) + tokens, grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, L, C) for a grid."""
        if grid == self.grid:
            return self.pos_embed
        built = self.class_index(self.grid)
        if built is None:
            return resize_grid(self.pos_embed, self.grid, grid)
        patches, cls = drop_row(self.pos_embed, built), self.pos_embed[:, built:built + 1]
        patches, index = resize_grid(patches, self.grid, grid), self.class_index(grid)
        return torch.cat([patches[:, :index], cls, patches[:, index:]], dim=1)

    def rotation(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Rotary tables (L, C) for a grid; the class token is not turned."""
        if self.rope is None:
            return None
        cos, sin = self.rope(grid)
        index = self.class_index(grid)
        if index is not None:
            still = cos.new_ones(1, cos.shape[1])
            cos = torch.cat([cos[:index], still, cos[index:]])
            sin = torch.cat([sin[:index], 0 * still, sin[index:]])
        return cos, sin

    def stream(self, tokens: Tensor, grid: tuple[int, int], stop: int
               ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the first ``stop`` blocks.

        Yields:
            Per block the stream that it reads, and its mixer's output.  The stream is the sum of
            the tokens and all earlier outputs, each thinned by the stochastic depth of the block
            after it.
        """
        rotation = self.rotation(grid)
        layers = self.layers[:stop]
        prepared = prepare_mixers([block.mixer for block in layers], tokens, grid)
        drops = draw_together([block.drop_path for block in layers], tokens)
        hidden, stream = tokens, None
        for block, ready, drop, again in zip(layers, prepared, drops, self.with_cp[:stop],
                                             strict=True):
            saving = again and torch.is_grad_enabled()
            if stream is None or rotation is not None or saving:
                stream = self.entering(stream, hidden, rotation, drop)
                if saving and keeps_for_backward(block, stream):
                    hidden = recomputed(block, stream, grid, ready, draws=False)
                else:
                    hidden = block(stream, grid, ready)
            else:
                stream, hidden = block(stream, grid, ready, hidden, drop)
            yield stream, hidden

    def entering(self, stream: Tensor | None, hidden: Tensor,
                 rotation: tuple[Tensor, Tensor] | None, drop: nn.Module | Tensor | None) -> Tensor:
        """Stream that a block reads, from that and the output of the block before.

        Args:
            stream: None for the first block.
            hidden: the output, for the first block the tokens.
            rotation: both are turned by, so their sum is.
            drop: stochastic depth of the output.
        """
        if rotation is not None:
            return rotated_sum(stream, hidden, drop, *rotation)
        return hidden if stream is None else stream + dropped(hidden, drop)

    def to_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, L, C) to a contiguous map (B, C, h, w) without the class token."""
        index = self.class_index(grid)
        if index is not None:
            tokens = drop_row(tokens, index)
        return tokens.mT.unflatten(2, grid).contiguous()

    # --- weights ---

    def adapt_positions(self, state_dict: dict[str, Tensor], row: str) -> dict[str, Tensor]:
        """Fit a file's position embedding, class token and rotary tables to this model.

        Args:
            state_dict: names as in this module.
            row: 'middle' or 'first', the row of a class token that this model does not have.
        """
        state_dict = dict(state_dict)
        rows = state_dict.get('pos_embed')
        if rows is not None and _is_table(rows, 3) and rows.shape != self.pos_embed.shape:
            has_class = class_row_of(rows.shape[1], 'cls_token' in state_dict) is not None
            cls = None
            if has_class:
                at = (rows.shape[1] - 1) // 2 if row == 'middle' else 0
                rows, cls = drop_row(rows, at), rows[:, at:at + 1]
            side = math.isqrt(rows.shape[1])
            if side * side == rows.shape[1]:
                rows = resize_grid(rows, (side, side), self.grid)
            index = self.class_index(self.grid)
            if index is not None and cls is not None:
                rows = torch.cat([rows[:, :index], cls, rows[:, index:]], dim=1)
            state_dict['pos_embed'] = rows
        if self.cls_token is None:
            state_dict.pop('cls_token', None)
        for name in [n for n, table in state_dict.items()
                     if n.startswith('rope.') and _is_table(table, 2)]:
            table = state_dict[name]
            side = math.isqrt(table.shape[0])
            if self.rope is None:
                del state_dict[name]
            elif table.shape[0] != self.grid[0] * self.grid[1]:
                if self.rope.interpolate and side * side == table.shape[0]:
                    state_dict[name] = resize_grid(table, (side, side), self.grid)
                else:  # computed for the grid of this model
                    state_dict[name] = getattr(self.rope, name.removeprefix('rope.')).clone()
        return state_dict


def _is_table(tensor: Tensor, dims: int) -> bool:
    # anything else stays as it is, and is refused for its shape
    return tensor.dim() == dims and tensor.numel() > 0


def drop_row(rows: Tensor, index: int) -> Tensor:
    """Leave out one token of (B, L, C)."""
    return torch.cat([rows[:, :index], rows[:, index + 1:]], dim=1)


def class_row_of(rows: int, has_token: bool) -> int | None:
    """Index of the class row among so many rows of a middle class token file, None without one."""
    square = math.isqrt(rows) ** 2 == rows
    return None if square and not has_token else (rows - 1) // 2
