"""Two-layer perceptron of a token block."""
from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn
from .linear import TokenLinear, token_linear

__all__ = ['Mlp']


class Mlp(nn.Module):
    """Linear, exact GELU, Linear on tokens (..., C), or maps where ``linear`` takes them.

    Args:
        dim: C, input and output width.
        hidden_dim: width in between.
        linear: makes the layers; those for maps may act on another axis than the last.
    """

    def __init__(self, dim: int, hidden_dim: int,
                 linear: Callable[[int, int], nn.Module] = token_linear):
        super().__init__()
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        fc1 = self.fc1
        if isinstance(fc1, TokenLinear) and onednn.takes(x, fc1):
            return self.fc2(fc1.forward(x, 'gelu'))
        return self.fc2(F.gelu(fc1(x)))
