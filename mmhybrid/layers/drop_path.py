"""Stochastic depth."""
from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ['DropPath', 'drop_path_or_identity']


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
