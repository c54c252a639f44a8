"""Linear layers of tokens and of the channels of a map."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn

__all__ = ['Linear2d', 'TokenLinear', 'map_linear', 'token_linear']


class TokenLinear(nn.Linear):
    """``nn.Linear`` on tokens (..., C); inference in float32 on a CPU computes it with oneDNN."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Shape (..., C) to (..., C'); an activation is for those who know that oneDNN takes x."""
        if onednn.takes(x, self):
            return onednn.linear(x, self.weight, self.bias, activation)
        assert activation is None
        return F.linear(x, self.weight, self.bias)


class Linear2d(TokenLinear):
    """A linear layer over the channel axis of a (B, C, H, W) map.

    A 1x1 convolution that keeps the two-dimensional weight of ``nn.Linear``, so that files serve
    both layouts.  The channels of a result lie side by side in memory; those of a map that lie so
    are read without a copy.
    """

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Shape (B, in_features, H, W) to (B, out_features, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1), activation).permute(0, 3, 1, 2)


def token_linear(in_features: int, out_features: int, bias: bool = True) -> TokenLinear:
    """Give a :class:`TokenLinear` with truncated normal weights (std 0.02) and zero bias.

    Layers initialise themselves when they are built, so that a model needs no pass over all of its
    modules afterwards: such a pass is how the published code loses its step initialisation.
    """
    return _initialised(TokenLinear(in_features, out_features, bias=bias))


def map_linear(in_features: int, out_features: int, bias: bool = True, *,
               channel_first: bool = False) -> TokenLinear:
    """Give a linear layer for (B, C, H, W) or (B, H, W, C) maps, initialised as token layers are.

    Weights are truncated normal (std 0.02), biases zero.
    """
    return _initialised((Linear2d if channel_first else TokenLinear)(
        in_features, out_features, bias=bias))


def _initialised(layer: TokenLinear) -> TokenLinear:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
