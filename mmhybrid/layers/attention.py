"""Multi-head self-attention."""
from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops.attention import attention, unsupported_reason

from .linear import token_linear

__all__ = ['Attention']


class Attention(nn.Module):
    """Plain multi-head self-attention over all tokens, without mask or position term.

    Args:
        dim: C, token width.
        num_heads: number of heads; must divide ``dim``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'got num_heads={num_heads} for {dim} channels, expected a positive '
                             f'divisor of {dim}; change num_heads or the width of the model')
        self.num_heads = num_heads
        self.qkv = token_linear(dim, 3 * dim)
        self.proj = token_linear(dim, dim)

    def forward(self, x: Tensor, kept: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Attend to all tokens.

        Args:
            x: (B, L, C).
            kept: picks the tokens whose outputs are wanted, (B, L, ...) to (B, L', ...); None for
                all.

        Returns:
            (B, L', C).
        """
        B, L, C = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.unbind(2)  # each: B L heads head_width
        if kept is not None:
            q = kept(q)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if unsupported_reason(q, k, v) is None:
            x = attention(q, k, v)
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))
