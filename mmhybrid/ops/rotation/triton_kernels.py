"""Triton kernels of a turned sum: a tile is some tokens by some pairs of neighbouring channels.

Names as in the kernels of the selective scan: ``p_`` pointers, ``o_`` offsets, ``b_`` blocks,
``m_`` masks. C channels, L tokens of a sample, M tokens of all samples. Arithmetic is float32.
"""

import triton
import triton.language as tl

from ..unrolled import for_this_triton

_SIZES = ['tokens', 'length', 'blocks']


@triton.jit
def _tile(tokens, length, channels, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of the pairs' first channels in tokens and in tables, their mask, and samples."""
    pid = tl.program_id(0).to(tl.int64)
    o_t = pid // blocks * ROWS + tl.arange(0, ROWS)
    o_d = (pid % blocks * COLS + tl.arange(0, COLS)) * 2
    m = (o_t < tokens)[:, None] & (o_d < channels)[None, :]
    o = o_t[:, None] * channels + o_d[None, :]
    o_table = (o_t % length)[:, None] * channels + o_d[None, :]
    return o, o_table, m, o_t // length, o_t < tokens


@triton.jit
def _pair(p, o, m):
    """Both channels of pairs."""
    b_a = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(p + o + 1, mask=m, other=0.0).to(tl.float32)
    return b_a, b_b


@triton.jit
def _put_pair(p, o, m, b_a, b_b):
    tl.store(p + o, b_a.to(p.dtype.element_ty), mask=m)
    tl.store(p + o + 1, b_b.to(p.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_SIZES)
def rotated_sum_kernel(
    p_stream, p_hidden, p_factor, p_cos, p_sin, p_out, tokens, length, channels, blocks,
    HAS_STREAM: tl.constexpr, HAS_FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """p_out (M, C) = turned(stream + factor hidden); tables are (L, C), factors one a sample."""
    o, o_table, m, i_b, m_t = _tile(tokens, length, channels, blocks, ROWS, COLS)
    b_a, b_b = _pair(p_hidden, o, m)
    if HAS_FACTOR:
        b_factor = tl.load(p_factor + i_b, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_a *= b_factor
        b_b *= b_factor
    if HAS_STREAM:
        b_s, b_t = _pair(p_stream, o, m)
        b_a += b_s
        b_b += b_t
    b_cos_a, b_cos_b = _pair(p_cos, o_table, m)
    b_sin_a, b_sin_b = _pair(p_sin, o_table, m)
    _put_pair(p_out, o, m, b_a * b_cos_a - b_b * b_sin_a, b_b * b_cos_b + b_a * b_sin_b)


@triton.jit(do_not_specialize=_SIZES)
def rotated_sum_backward_kernel(
    p_dout, p_factor, p_cos, p_sin, p_dstream, p_dhidden, tokens, length, channels, blocks,
    HAS_STREAM: tl.constexpr, HAS_FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of the stream and of what is added to it."""
    o, o_table, m, i_b, m_t = _tile(tokens, length, channels, blocks, ROWS, COLS)
    b_a, b_b = _pair(p_dout, o, m)
    b_cos_a, b_cos_b = _pair(p_cos, o_table, m)
    b_sin_a, b_sin_b = _pair(p_sin, o_table, m)
    b_s = b_a * b_cos_a + b_b * b_sin_b
    b_t = b_b * b_cos_b - b_a * b_sin_a
    if HAS_STREAM:
        _put_pair(p_dstream, o, m, b_s, b_t)
    if HAS_FACTOR:
        b_factor = tl.load(p_factor + i_b, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_s *= b_factor
        b_t *= b_factor
    _put_pair(p_dhidden, o, m, b_s, b_t)


globals().update(for_this_triton(globals()))
