"""Stochastic depth."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ['DropPath', 'draw_together', 'drop_path_or_identity', 'dropped']


class DropPath(nn.Module):
    """Drop a residual branch for whole samples of the leading axis.

    Kept samples are scaled by 1 / (1 - rate), so the expectation is unchanged; eval mode is the
    identity.  The same rule as timm's module of this name (Huang et al., "Deep Networks with
    Stochastic Depth", 2016); written out because importing timm imports torchvision.

    Args:
        rate: probability of dropping, in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, ...) in and out."""
        if not self.training:
            return x
        return x * self.factor(x, x.dtype).view(-1, *(1,) * (x.dim() - 1))

    def factor(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw the factors (B,) of a branch (B, ...) in training: 0 or 1 / (1 - rate)."""
        keep = 1 - self.rate
        return x.new_empty(x.shape[0], dtype=dtype).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the rate in the printed module."""
        return f'rate={self.rate:g}'


def drop_path_or_identity(rate: float) -> nn.Module:
    """Give a DropPath, or a no-op for a rate of exactly 0."""
    return DropPath(rate) if rate else nn.Identity()


def draw_together(paths: Sequence[nn.Module], x: Tensor, sizes: Sequence[int] | None = None
                  ) -> list[Tensor | None]:
    """Draw the factors of many modules of this file in a few calls for all of them.

    Args:
        paths: a :class:`DropPath` or ``nn.Identity`` each.
        x: a branch (B, ...).
        sizes: B of each module's branch; None for that of x.

    Returns:
        For each module its factors (B,), float32, or None where it drops nothing.
    """
    found: list[Tensor | None] = [None] * len(paths)
    active = [i for i, path in enumerate(paths) if isinstance(path, DropPath) and path.training]
    if active:
        keeps = [1 - paths[i].rate for i in active]
        own = [len(x) if sizes is None else sizes[i] for i in active]
        drawn = x.new_empty(sum(own), dtype=torch.float32).uniform_().split(own)
        # the whole part of a number that is uniform in [keep, 1 + keep) is 1 with probability keep
        torch._foreach_add_(drawn, keeps)
        torch._foreach_floor_(drawn)
        torch._foreach_div_(drawn, keeps)
        for i, factors in zip(active, drawn, strict=True):
            found[i] = factors
    return found


def dropped(x: Tensor, drop: nn.Module | Tensor | None) -> Tensor:
    """A branch (B, ...) after a module of this file, or times factors that were drawn before."""
    if isinstance(drop, Tensor):
        return x * drop.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
    return x if drop is None else drop(x)
