"""Rotary position tables of plain vision state-space models."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops import rotation, triton_support

from .drop_path import DropPath, dropped

__all__ = ['Rope2d', 'resize_grid', 'rotate', 'rotated_sum']


def rope_tables(dim: int, height: int, width: int, side: int = 14,
                device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height * width, dim) of a grid.

    Positions are stretched so that every grid spans ``side`` positions along each axis, that of
    pretraining.  The first half of the channels turns with the row, the second with the column;
    both channels of a pair turn by the same angle.
    """
    # double precision: the tables are part of checkpoints and should not depend on the machine
    exact = dict(dtype=torch.float64, device=device)
    frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2, **exact) / (dim // 2))

    def angles(count: int) -> Tensor:
        position = torch.arange(count, **exact) / count * side
        return torch.outer(position, frequency).repeat_interleave(2, dim=1)

    def table(rows: Tensor, columns: Tensor) -> Tensor:
        rows = rows[:, None].expand(-1, width, -1)
        columns = columns[None].expand(height, -1, -1)
        return torch.cat([rows, columns], dim=-1).reshape(height * width, dim)

    rows, columns = angles(height), angles(width)  # few angles, each in many rows of the table
    return (table(rows.cos().float(), columns.cos().float()),
            table(rows.sin().float(), columns.sin().float()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of tokens (B, L, C) by tables (L, C)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


def rotated_sum(stream: Tensor | None, hidden: Tensor, drop: nn.Module | Tensor | None,
                cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate` of stream + hidden, in one kernel where Triton runs.

    Args:
        stream: (B, L, C), None for none.
        hidden: (B, L, C).
        drop: stochastic depth of ``hidden``, see :func:`mmhybrid.layers.dropped`.
        cos: (L, C).
        sin: (L, C).
    """
    if not _fits(stream, hidden, cos):
        total = dropped(hidden, drop)
        return rotate(total if stream is None else stream + total, cos, sin)
    if isinstance(drop, DropPath):
        drop = drop.factor(hidden) if drop.training else None
    factor = drop if isinstance(drop, Tensor) else None
    return rotation.rotated_sum(stream, hidden, factor, cos, sin)


def _fits(stream: Tensor | None, hidden: Tensor, cos: Tensor) -> bool:
    """Whether the kernel takes a call; a compiler fuses the operations of PyTorch by itself."""
    return not (torch.compiler.is_compiling() or triton_support.not_default_reason()
                or rotation.unsupported_reason(stream, hidden, cos))


def resize_grid(rows: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize (..., h * w, C), one row per cell of a grid, bicubically in float32.

    Without anti-aliasing and with cell centres aligned, as published loaders do.  The same size
    gives the input itself.
    """
    if source == target:
        return rows
    grid = rows.reshape(-1, *source, rows.shape[-1]).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=target, mode='bicubic', align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(*rows.shape[:-2], -1, rows.shape[-1]).to(rows.dtype)


class Rope2d(nn.Module):
    """Tables for one grid, kept in the state dict as published weights have them.

    Args:
        dim: C; a multiple of 4.
        grid: (rows, columns) of tokens.
        interpolate: give other grids resized tables (LocalVim) instead of their own (Vim).  These
            are different functions: the published networks need the one they were trained with.
    """

    def __init__(self, dim: int, grid: tuple[int, int], interpolate: bool = False):
        super().__init__()
        self.dim, self.grid, self.interpolate = dim, tuple(grid), interpolate
        cos, sin = rope_tables(dim, *self.grid)
        self.register_buffer('freqs_cos', cos)
        self.register_buffer('freqs_sin', sin)

    def forward(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (L, C) for a grid."""
        tables = self.freqs_cos, self.freqs_sin
        if tuple(grid) == self.grid:
            return tables
        if self.interpolate:
            return tuple(resize_grid(table, self.grid, tuple(grid)) for table in tables)
        # Made where they are used: a copy from the host waits, and no CUDA graph can hold it.
        device = self.freqs_cos.device
        made = None if device.type == 'mps' else device  # which has no double precision
        return tuple(t.to(device) for t in rope_tables(self.dim, *grid, device=made))
