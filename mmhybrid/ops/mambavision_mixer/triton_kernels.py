"""Triton kernels before the scan of a MambaVision mixer: both short convolutions with SiLU.

Token-major throughout. B batch, L tokens, E scanned channels, C = 2 E, K taps, N state. A program
owns a tile of tokens by channels; the taps are shifted loads, which the cache serves. Arithmetic is
float32. Prefixes as in the kernels of the scan: ``p_`` pointers, ``i_`` indices, ``o_`` offsets,
``b_`` blocks, ``m_`` masks.
"""

import triton
import triton.language as tl

from ..selective_scan.kernels.common import sigmoid
from ..unrolled import for_this_triton

# Numbers that follow the size of the image: a kernel is compiled once for all their values.
_SIZES = ['length', 'n_tiles', 'steps']


@triton.jit
def _tokens(p, row, t, length, stride, o_c, m_c):
    """A tile of tokens t of the sequence that starts at ``row``; zero outside of the sequence."""
    mask = (t >= 0) & (t < length) & m_c
    return tl.load(p + (row + t) * stride + o_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _taps(p_w, o_c, m_c, K: tl.constexpr):
    """The filters of a block of channels: for each tap a row of weights."""
    w_k = ()
    for k in tl.static_range(K):
        w_k = w_k + (tl.load(p_w + o_c * K + k, mask=m_c, other=0.0).to(tl.float32),)
    return w_k


@triton.jit
def _conv_silu(
    p_in, w_k, p_out, row, t, length, in_stride, out_stride, o_c, m_c,
    K: tl.constexpr, LEFT: tl.constexpr,
):
    """out[t] = silu(sum_k w[k] in[t + k - LEFT]), one filter per channel."""
    b_sum = tl.zeros([t.shape[0], o_c.shape[1]], tl.float32)
    for k in tl.static_range(K):
        b_sum += w_k[k] * _tokens(p_in, row, t + (k - LEFT), length, in_stride, o_c, m_c)
    b_out = b_sum * sigmoid(b_sum)
    tl.store(
        p_out + (row + t) * out_stride + o_c,
        b_out.to(p_out.dtype.element_ty),
        mask=(t < length) & m_c,
    )


@triton.jit(do_not_specialize=_SIZES)
def prescan_kernel(
    p_xz, p_wx, p_wz, p_log, p_bias, p_u, p_yz, p_A, p_step,
    length, channels, n_tiles, steps,
    N: tl.constexpr, K: tl.constexpr, LEFT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WITH_Z: tl.constexpr,
):
    """Convolve both halves of xz (B, L, C): the left one to u (B, L, E), the right one into yz.

    The right half of yz (B, L, C) is where the concatenation of the mixer wants it. On the way the
    scan's parameters take the form that it reads: A = -exp(log) (E, N) and step = 2 bias (E,).
    """
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_t = tl.program_id(0) % n_tiles
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_c = o_c < channels
    if tl.program_id(0) == 0:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_step + o_c, 2.0 * b_bias, mask=m_c)
        for n in tl.static_range(N):
            b_log = tl.load(p_log + o_c * N + n, mask=m_c, other=0.0).to(tl.float32)
            tl.store(p_A + o_c * N + n, -tl.exp(b_log), mask=m_c)
    o_r = tl.arange(0, ROWS)[:, None]
    row = i_b * length
    wx_k = _taps(p_wx, o_c, m_c, K)
    if WITH_Z:
        wz_k = _taps(p_wz, o_c, m_c, K)
    for i in range(0, steps):
        t = (i_t * steps + i) * ROWS + o_r
        _conv_silu(p_xz, wx_k, p_u, row, t, length, 2 * channels, channels, o_c, m_c, K, LEFT)
        if WITH_Z:
            _conv_silu(
                p_xz + channels, wz_k, p_yz + channels, row, t, length, 2 * channels, 2 * channels,
                o_c, m_c, K, LEFT,
            )


@triton.jit
def _conv_silu_backward(
    p_in, w_k, p_dout, p_din, row, t, length, in_stride, dout_stride, o_c, m_c, dw_k,
    K: tl.constexpr, LEFT: tl.constexpr,
):
    """Write the gradient of the input at tokens t; add those tokens to the gradients of the taps.

    The gradient at token t needs that of the sums at t + LEFT - k, and those need the inputs at
    distances below K: everything near is loaded once and kept in registers.
    """
    in_j = ()
    for j in tl.static_range(2 * K - 1):
        in_j = in_j + (_tokens(p_in, row, t + (j - K + 1), length, in_stride, o_c, m_c),)
    b_din = tl.zeros([t.shape[0], o_c.shape[1]], tl.float32)
    new_k = dw_k
    for k in tl.static_range(K):
        b_sum = tl.zeros([t.shape[0], o_c.shape[1]], tl.float32)
        for i in tl.static_range(K):
            b_sum += w_k[i] * in_j[K - 1 + i - k]
        b_gate = sigmoid(b_sum)
        b_dsum = _tokens(p_dout, row, t + (LEFT - k), length, dout_stride, o_c, m_c)
        b_dsum = b_dsum * b_gate * (1.0 + b_sum * (1.0 - b_gate))
        b_din += w_k[k] * b_dsum
        if k == LEFT:
            new_k = ()
            for i in tl.static_range(K):
                new_k = new_k + (dw_k[i] + b_dsum * in_j[K - 1 + i - LEFT],)
    tl.store(
        p_din + (row + t) * in_stride + o_c,
        b_din.to(p_din.dtype.element_ty),
        mask=(t < length) & m_c,
    )
    return new_k


@triton.jit(do_not_specialize=_SIZES)
def prescan_backward_kernel(
    p_xz, p_wx, p_wz, p_A, p_du, p_dyz, p_dxz, p_dw, p_dlog, p_dbias,
    length, channels, n_tiles, steps,
    N: tl.constexpr, K: tl.constexpr, LEFT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """dxz (B, L, C) from du (B, L, E) and the right half of dyz (B, L, C).

    A program takes ``steps`` tiles in turn and writes its share of the gradients of the taps to
    p_dw (B n_tiles, C, K): no atomics, so every run gives the same bits. On the way the gradients
    of the scan's parameters become those of the mixer's, where they lie: dlog = dA A (E, N) and
    dbias = 2 dstep (E,).
    """
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_t = tl.program_id(0) % n_tiles
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_c = o_c < channels
    o_r = tl.arange(0, ROWS)[:, None]
    row = i_b * length
    wx_k = _taps(p_wx, o_c, m_c, K)
    wz_k = _taps(p_wz, o_c, m_c, K)
    dwx_k = ()
    dwz_k = ()
    for _ in tl.static_range(K):
        dwx_k = dwx_k + (tl.zeros([ROWS, BLOCK], tl.float32),)
        dwz_k = dwz_k + (tl.zeros([ROWS, BLOCK], tl.float32),)
    for i in range(0, steps):
        t = (i_t * steps + i) * ROWS + o_r
        dwx_k = _conv_silu_backward(
            p_xz, wx_k, p_du, p_dxz, row, t, length, 2 * channels, channels, o_c, m_c, dwx_k,
            K, LEFT,
        )
        dwz_k = _conv_silu_backward(
            p_xz + channels, wz_k, p_dyz + channels, p_dxz + channels, row, t, length,
            2 * channels, 2 * channels, o_c, m_c, dwz_k, K, LEFT,
        )
    p_dw += tl.program_id(0).to(tl.int64) * 2 * channels * K + o_c * K
    for k in tl.static_range(K):
        tl.store(p_dw + k, tl.sum(dwx_k[k], axis=0)[None, :], mask=m_c)
        tl.store(p_dw + channels * K + k, tl.sum(dwz_k[k], axis=0)[None, :], mask=m_c)
    if tl.program_id(0) == 0:
        b_dbias = tl.load(p_dbias + o_c, mask=m_c, other=0.0)
        tl.store(p_dbias + o_c, 2.0 * b_dbias, mask=m_c)
        for n in tl.static_range(N):
            b_A = tl.load(p_A + o_c * N + n, mask=m_c, other=0.0)
            b_dA = tl.load(p_dlog + o_c * N + n, mask=m_c, other=0.0)
            tl.store(p_dlog + o_c * N + n, b_dA * b_A, mask=m_c)


globals().update(for_this_triton(globals()))
