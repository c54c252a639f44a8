"""Triton kernels of a turned sum: a tile is some tokens by some channels, in pairs of neighbours.

Names as in the kernels of the selective scan: ``p_`` pointers, ``o_`` offsets, ``b_`` blocks,
``m_`` masks. C channels, L tokens of a sample, M tokens of all samples. Arithmetic is float32.
"""

import triton
import triton.language as tl

from ..unrolled import for_this_triton

_SIZES = ['tokens', 'length', 'blocks']


@triton.jit
def _tile(tokens, length, channels, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets in tokens and in tables, their mask, samples, and which of them there are."""
    pid = tl.program_id(0)
    o_t = pid // blocks * ROWS + tl.arange(0, ROWS)
    o_d = pid % blocks * COLS + tl.arange(0, COLS)
    m = (o_t < tokens)[:, None] & (o_d < channels)[None, :]
    i_b = o_t // length
    o = o_t.to(tl.int64)[:, None] * channels + o_d[None, :]
    o_table = (o_t - i_b * length).to(tl.int64)[:, None] * channels + o_d[None, :]
    return o, o_table, m, i_b, o_t < tokens


@triton.jit
def _pair(p, o, m, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Both channels of pairs, loaded side by side."""
    b_x = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(b_x, (ROWS, COLS // 2, 2)))


@triton.jit
def _put_pair(p, o, m, b_a, b_b, ROWS: tl.constexpr, COLS: tl.constexpr):
    b_x = tl.reshape(tl.join(b_a, b_b), (ROWS, COLS))
    tl.store(p + o, b_x.to(p.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_SIZES)
def rotated_sum_kernel(
    p_stream, p_hidden, p_factor, p_cos, p_sin, p_out, tokens, length, channels, blocks,
    HAS_STREAM: tl.constexpr, HAS_FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """p_out (M, C) = turned(stream + factor hidden); tables are (L, C), factors one a sample."""
    o, o_table, m, i_b, m_t = _tile(tokens, length, channels, blocks, ROWS, COLS)
    b_a, b_b = _pair(p_hidden, o, m, ROWS, COLS)
    if HAS_FACTOR:
        b_factor = tl.load(p_factor + i_b, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_a *= b_factor
        b_b *= b_factor
    if HAS_STREAM:
        b_s, b_t = _pair(p_stream, o, m, ROWS, COLS)
        b_a += b_s
        b_b += b_t
    b_cos_a, b_cos_b = _pair(p_cos, o_table, m, ROWS, COLS)
    b_sin_a, b_sin_b = _pair(p_sin, o_table, m, ROWS, COLS)
    b_c, b_d = b_a * b_cos_a - b_b * b_sin_a, b_b * b_cos_b + b_a * b_sin_b
    _put_pair(p_out, o, m, b_c, b_d, ROWS, COLS)


@triton.jit(do_not_specialize=_SIZES)
def rotated_sum_backward_kernel(
    p_dout, p_factor, p_cos, p_sin, p_dstream, p_dhidden, tokens, length, channels, blocks,
    HAS_STREAM: tl.constexpr, HAS_FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """The gradients of the stream and of what is added to it."""
    o, o_table, m, i_b, m_t = _tile(tokens, length, channels, blocks, ROWS, COLS)
    b_a, b_b = _pair(p_dout, o, m, ROWS, COLS)
    b_cos_a, b_cos_b = _pair(p_cos, o_table, m, ROWS, COLS)
    b_sin_a, b_sin_b = _pair(p_sin, o_table, m, ROWS, COLS)
    b_s = b_a * b_cos_a + b_b * b_sin_b
    b_t = b_b * b_cos_b - b_a * b_sin_a
    if HAS_STREAM:
        _put_pair(p_dstream, o, m, b_s, b_t, ROWS, COLS)
    if HAS_FACTOR:
        b_factor = tl.load(p_factor + i_b, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_s *= b_factor
        b_t *= b_factor
    _put_pair(p_dhidden, o, m, b_s, b_t, ROWS, COLS)


globals().update(for_this_triton(globals()))
