"""Triton kernels of the selective scan: channels over lanes, states in registers, tokens in turn.

One program owns BLOCK channels of one group, one chunk of the sequence and one batch item. It
keeps the N states of its channels as a tuple of vectors, so that a step is N exponentials and
3 N multiply-adds per channel with neither shuffles nor shared memory.

Names: ``p_`` pointers, ``i_`` indices, ``b_`` blocks (vectors over channels), ``s`` positions in
the order of visit. B batch, G groups, H channels per group, D = G H, L tokens, N state, NC chunks.
All arithmetic is float32; offsets that grow with a tensor's size are int64.
"""

from ...unrolled import for_this_triton
from .backward import (
    scan_backward_aggregate_kernel,
    scan_backward_kernel,
    sum_gradients_kernel,
)
from .common import scan_carry_kernel
from .forward import AGGREGATE, FEW, FINAL, SINGLE, scan_forward_kernel

__all__ = [
    'AGGREGATE', 'FEW', 'FINAL', 'SINGLE', 'scan_backward_aggregate_kernel',
    'scan_backward_kernel', 'scan_carry_kernel', 'scan_forward_kernel', 'sum_gradients_kernel',
]

globals().update(for_this_triton(globals()))
