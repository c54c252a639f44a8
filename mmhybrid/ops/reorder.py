"""Tokens read in another order: the one gather behind every scan that takes copies.

As an operator, so that a compiler sees one node where there would be ten, whatever the size.
"""

import torch
from torch import Tensor

__all__ = ['inverse_of', 'reorder']

_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_library.define(
    'reorder(Tensor x, Tensor table, Tensor inverse, bool holes, bool inverse_holes) -> Tensor'
)


def reorder(
    x: Tensor, table: Tensor, inverse: Tensor, holes: bool, inverse_holes: bool
) -> Tensor:
    """Read the last axis of x by a table of indices; differentiable any number of times.

    The gradient reads by the inverse, so there is no scatter and no atomic addition, and every run
    gives the same bits.

    Args:
        x: (..., L), or (B, G, R, L) for a table of several rows.
        table: integers, (L',) or one row of them per group, (1, L') or (G, L').
        inverse: the table of the way back, (L,) or (G, L) likewise.
        holes: whether ``table`` holds -1, where a zero is read.
        inverse_holes: whether ``inverse`` does.

    Returns:
        (..., L') or (B, G, R, L'), contiguous.
    """
    return _reorder(x, table, inverse, holes, inverse_holes)


def inverse_of(order: Tensor, tokens: int) -> Tensor:
    """The position at which each token is read, (G, L), by orders (G, L') that may hold -1."""
    order = order.long()
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    # Positions without a token write to one that is cut off.
    inverse = order.new_zeros(len(order), tokens + 1)
    return inverse.scatter_(1, torch.where(order >= 0, order, tokens), positions)[:, :tokens]


@torch.library.impl(_library, 'reorder', 'CompositeExplicitAutograd')
def _gather(x, table, inverse, holes, inverse_holes):
    # torch.gather with an expanded index: several times faster than index_select on a CPU.
    index = table.long()
    if index.dim() == 2:
        index = index.unsqueeze(1)
    if not holes:
        return x.gather(-1, index.expand(*x.shape[:-1], -1))
    out = x.gather(-1, index.clamp_min(0).expand(*x.shape[:-1], -1))
    return out.masked_fill_(index < 0, 0)


@torch.library.register_fake('mmhybrid::reorder', lib=_library)
def _gather_fake(x, table, *_):
    return x.new_empty((*x.shape[:-1], table.shape[-1]))


_reorder = torch.ops.mmhybrid.reorder


def _setup_context(ctx, inputs, output):
    _, table, inverse, *holes = inputs
    ctx.save_for_backward(inverse, table)
    ctx.holes = holes[::-1]


def _backward(ctx, grad):
    return _reorder(grad, *ctx.saved_tensors, *ctx.holes), None, None, None, None


torch.library.register_autograd(
    'mmhybrid::reorder', _backward, setup_context=_setup_context, lib=_library
)
