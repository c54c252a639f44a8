"""The linear layer of token blocks."""
from __future__ import annotations

from torch import nn

__all__ = ['token_linear']


def token_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Give an ``nn.Linear`` with truncated normal weights (std 0.02) and zero bias.

    Layers initialise themselves when they are built, so that a model needs no pass over all of its
    modules afterwards: such a pass is how the published code loses its step initialisation.
    """
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
