"""Linear layers over the channels of a map."""
from __future__ import annotations

from torch import Tensor, nn

from .linear import TokenLinear

__all__ = ['Linear2d', 'map_linear']


class Linear2d(TokenLinear):
    """A linear layer over the channel axis of a (B, C, H, W) map.

    A 1x1 convolution that keeps the two-dimensional weight of ``nn.Linear``, so that files serve
    both layouts.  The channels of a result lie side by side in memory; those of a map that lie so
    are read without a copy.
    """

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Shape (B, in_features, H, W) to (B, out_features, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1), activation).permute(0, 3, 1, 2)


def map_linear(in_features: int, out_features: int, bias: bool = True, *,
               channel_first: bool = False) -> nn.Linear:
    """Give a linear layer for (B, C, H, W) or (B, H, W, C) maps, initialised as token layers are.

    Weights are truncated normal (std 0.02), biases zero.
    """
    layer = (Linear2d if channel_first else TokenLinear)(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
