"""Two-layer perceptron of a token block."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import token_linear

__all__ = ['Mlp']


class Mlp(nn.Module):
    """Linear, exact GELU, Linear on tokens (..., C).

    Args:
        dim: C, input and output width.
        hidden_dim: width in between.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = token_linear(dim, hidden_dim)
        self.fc2 = token_linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., C) in and out."""
        return self.fc2(F.gelu(self.fc1(x)))
