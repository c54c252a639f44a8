"""The linear layer of token blocks."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn

__all__ = ['TokenLinear', 'token_linear']


class TokenLinear(nn.Linear):
    """``nn.Linear`` on tokens (..., C); inference in float32 on a CPU computes it with oneDNN."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Shape (..., C) to (..., C'); an activation is for those who know that oneDNN takes x."""
        if onednn.takes(x, self):
            return onednn.linear(x, self.weight, self.bias, activation)
        assert activation is None
        return F.linear(x, self.weight, self.bias)


def token_linear(in_features: int, out_features: int, bias: bool = True) -> TokenLinear:
    """Give a :class:`TokenLinear` with truncated normal weights (std 0.02) and zero bias.

    Layers initialise themselves when they are built, so that a model needs no pass over all of its
    modules afterwards: such a pass is how the published code loses its step initialisation.
    """
    layer = TokenLinear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
