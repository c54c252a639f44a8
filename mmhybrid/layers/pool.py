"""Pooling of feature maps."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['MapPool']


class MapPool(nn.Module):
    """Maximum over squares, for any map.

    Sides are divided and rounded down, as published pyramids do, but never below one pixel.

    Args:
        size: side and stride of the squares.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, max(H // size, 1), max(W // size, 1))."""
        return F.max_pool2d(x, [min(self.size, side) for side in x.shape[-2:]])
