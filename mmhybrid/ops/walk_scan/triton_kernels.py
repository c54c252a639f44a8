"""Triton kernels of the gate behind a scan along walks: a tile is some tokens by some channels.

Names as in the kernels of the selective scan: ``p_`` pointers, ``o_`` offsets, ``b_`` blocks,
``m_`` masks. K walks, E channels, M tokens of all images. Arithmetic is float32.
"""

import triton
import triton.language as tl

from ..selective_scan.kernels.common import sigmoid
from ..unrolled import for_this_triton

_SIZES = ['tokens', 'blocks']


@triton.jit
def _tile(tokens, channels, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tokens, channels and mask of a program."""
    pid = tl.program_id(0).to(tl.int64)
    o_t = pid // blocks * ROWS + tl.arange(0, ROWS)
    o_d = pid % blocks * COLS + tl.arange(0, COLS)
    return o_t[:, None], o_d[None, :], (o_t < tokens)[:, None] & (o_d < channels)[None, :]


@triton.jit
def _sum_of_walks(p_y, o_t, o_d, m, channels, WALKS: tl.constexpr, ROWS: tl.constexpr,
                  COLS: tl.constexpr):
    """What the walks left at a token, p_y (M, K, E), summed."""
    b_y = tl.zeros([ROWS, COLS], tl.float32)
    for k in tl.static_range(WALKS):
        p = p_y + (o_t * WALKS + k) * channels + o_d
        b_y += tl.load(p, mask=m, other=0.0).to(tl.float32)
    return b_y


@triton.jit(do_not_specialize=_SIZES)
def gate_kernel(
    p_y, p_z, p_out, tokens, channels, blocks, z_sl,
    FACTOR: tl.constexpr, WALKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """p_out (M, E) = FACTOR silu(z) sum_k y_k; rows of z are z_sl values apart."""
    o_t, o_d, m = _tile(tokens, channels, blocks, ROWS, COLS)
    b_y = _sum_of_walks(p_y, o_t, o_d, m, channels, WALKS, ROWS, COLS)
    b_z = tl.load(p_z + o_t * z_sl + o_d, mask=m, other=0.0).to(tl.float32)
    b_out = b_y * b_z * sigmoid(b_z) * FACTOR
    tl.store(p_out + o_t * channels + o_d, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_SIZES)
def gate_backward_kernel(
    p_y, p_z, p_dout, p_dy, p_dz, tokens, channels, blocks, z_sl,
    FACTOR: tl.constexpr, WALKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """p_dy (M, E), the same for every walk, and p_dz, whose rows are z_sl apart like those of z."""
    o_t, o_d, m = _tile(tokens, channels, blocks, ROWS, COLS)
    b_y = _sum_of_walks(p_y, o_t, o_d, m, channels, WALKS, ROWS, COLS)
    b_z = tl.load(p_z + o_t * z_sl + o_d, mask=m, other=0.0).to(tl.float32)
    o = o_t * channels + o_d
    b_dout = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32) * FACTOR
    b_sig = sigmoid(b_z)
    tl.store(p_dy + o, (b_dout * b_z * b_sig).to(p_dy.dtype.element_ty), mask=m)
    b_dz = b_dout * b_y * b_sig * (1.0 + b_z * (1.0 - b_sig))
    tl.store(p_dz + o_t * z_sl + o_d, b_dz.to(p_dz.dtype.element_ty), mask=m)


globals().update(for_this_triton(globals()))
