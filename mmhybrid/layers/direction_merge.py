"""How LocalMamba joins the results of several scan directions."""
from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops.selective_scan import cpp

from . import onednn
from .linear import token_linear

__all__ = ['ATTENTIONS', 'ChannelAttention', 'DirectionMixture', 'SpatialChannelAttention',
           'make_attention', 'merge_directions']

#: What directions go through before they are summed.
ATTENTIONS = ('channel', 'channel-spatial', 'none')


class ChannelAttention(nn.Module):
    """Scale channels by what their mean over all tokens says.

    From Huang et al., "LocalMamba" (arXiv 2403.09338), section 3.3.  The paper adds a branch over
    tokens, the published weights do not have it; see :class:`SpatialChannelAttention`.

    Args:
        dim: number of channels D.
        reduction: D over the width in between.
    """

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = token_linear(dim, dim // reduction)
        self.channel_select = token_linear(dim // reduction, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, ..., D) in and out; they are scaled as they are, not normalised."""
        return x * self.scale(self.norm(x).mean(dim=1, keepdim=True))

    def scale(self, mean: Tensor) -> Tensor:
        """Factors of channels (B, 1, ..., D) from the mean of the normalised tokens."""
        return self.channel_select(F.gelu(self.global_reduce(mean))).sigmoid()

    def takes(self, x: Tensor) -> bool:
        """Whether :meth:`merged` may stand for a call: in float32 on a CPU, where nobody looks."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        return not hooked and onednn.takes(x, self.norm)

    def merged(self, x: Tensor) -> Tensor:
        """The sum over K of what ``forward`` makes of (B, L, K, D), by the compiled kernels."""
        means = cpp.normed_means(x, self.norm.eps)
        means = torch.addcmul(self.norm.bias, means, self.norm.weight)
        return cpp.scaled_sum(x, self.scale(means.unsqueeze(1)).squeeze(1))


class SpatialChannelAttention(ChannelAttention):
    """Scale channels and tokens, as the paper describes it.

    The branch over tokens sets each one beside the mean of all and gives it one factor.

    Args:
        dim: number of channels D.
        reduction: D over the width in between.
    """

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__(dim, reduction)
        self.local_reduce = token_linear(dim, dim // reduction)
        self.spatial_select = token_linear(2 * (dim // reduction), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, ..., D) in and out."""
        normed = self.norm(x)
        mean = normed.mean(dim=1, keepdim=True)
        whole = F.gelu(self.global_reduce(mean))
        own = F.gelu(self.local_reduce(normed))
        of_tokens = self.spatial_select(torch.cat([own, whole.expand_as(own)], dim=-1)).sigmoid()
        return x * self.channel_select(whole).sigmoid() * of_tokens

    def takes(self, x: Tensor) -> bool:
        """The compiled kernels have no branch over tokens."""
        return False


def make_attention(kind: str, dim: int) -> ChannelAttention | None:
    """Attention over directions of D channels.

    Args:
        kind: 'channel' as in the published networks, 'channel-spatial' as in the paper, or 'none'.
        dim: number of channels D.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"got attention={kind!r}, expected one of {', '.join(ATTENTIONS)}")
    if kind == 'none':
        return None
    return (ChannelAttention if kind == 'channel' else SpatialChannelAttention)(dim)


class DirectionMixture(nn.Module):
    """Learned preference for directions, while a network is searched for the best ones.

    Args:
        count: number of directions K.
    """

    def __init__(self, count: int):
        super().__init__()
        # four axes, so that optimizers decay it as published
        self.weights = nn.Parameter(1e-3 * torch.randn(count, 1, 1, 1))

    def forward(self) -> Tensor:
        """Weights of the K directions, (K,); their sum is 1."""
        return self.weights.flatten().softmax(dim=0)


def merge_directions(ys: Iterable[Tensor], attention: ChannelAttention | None,
                     weights: Tensor | None = None, compiled: bool = False) -> Tensor:
    """Sum of the directions, each under attention.

    Args:
        ys: stacks (B, k, D, L) of results in row-major order, together K.
        attention: one for all directions; None for none.
        weights: (K,); while searching, results are normalised and summed with these weights.
        compiled: whether the results are the compiled scan's, so that there are kernels for this.

    Returns:
        (B, L, D).
    """
    total, first = None, 0
    for stack in ys:
        count = stack.shape[1]
        y = stack.permute(0, 3, 1, 2)  # B L k D
        if compiled and weights is None and attention is not None and attention.takes(y):
            y = attention.merged(y)
        else:
            y = y if attention is None else attention(y)
            if weights is not None:
                own = weights[first:first + count, None]
                y = own * F.layer_norm(y, y.shape[-1:])
            y = y.sum(2) if count > 1 else y.squeeze(2)
        first += count
        total = y if total is None else total + y
    return total
