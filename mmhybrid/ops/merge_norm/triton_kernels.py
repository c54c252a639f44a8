"""Triton kernels of sum, norm and gate: a tile is some tokens by all of their channels.

Names as in the kernels of the selective scan: ``p_`` pointers, ``i_`` indices, ``o_`` offsets,
``b_`` blocks, ``m_`` masks. B batch, K directions, D channels, L tokens. Arithmetic is float32;
offsets that grow with a tensor's size are int64.
"""

import triton
import triton.language as tl

from ..selective_scan.kernels.common import sigmoid
from ..unrolled import for_this_triton

_SIZES = ['length', 'total', 'repeat', 'programs', 'parts', 'tiles', 'share']


@triton.jit
def _at(o_l, o_d, length, sb, sl, sd):
    """Offsets of a tile of tokens, numbered through all images, in a tensor with these strides."""
    i_b = o_l // length
    return (i_b * sb + (o_l - i_b * length) * sl)[:, None] + o_d[None, :] * sd


@triton.jit(do_not_specialize=_SIZES)
def merge_norm_kernel(
    p_y, p_logit, p_weight, p_bias, p_gate, p_out, p_sum, p_stats,
    y_sb, y_sk, y_sl, y_sd, gate_sb, gate_sl, gate_sd, length, total, channels, eps,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """out = norm(sum_k sigmoid(logit_k) y_k) silu(gate); out and the sum are (B, L, D).

    p_logit is (B, K, D); without it the sum is that of the y_k as they are.
    p_stats is (2, B * L), float32: mean and inverse deviation of every token.
    """
    o_l = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, COLS)
    m_l, m_d = o_l < total, o_d < channels
    m = m_l[:, None] & m_d[None, :]
    p_y += _at(o_l, o_d, length, y_sb, y_sl, y_sd)
    b_s = tl.zeros([ROWS, COLS], tl.float32)
    for k in tl.static_range(K):
        b_y = tl.load(p_y + k * y_sk, mask=m, other=0.0).to(tl.float32)
        if p_logit is not None:
            o_k = ((o_l // length) * K + k)[:, None] * channels + o_d[None, :]
            b_y *= sigmoid(tl.load(p_logit + o_k, mask=m, other=0.0))
        b_s += b_y
    b_mean = tl.sum(b_s, axis=1) / channels
    b_x = tl.where(m_d[None, :], b_s - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)
    o = o_l[:, None] * channels + o_d[None, :]
    if p_sum is not None:
        tl.store(p_sum + o, b_s.to(p_sum.dtype.element_ty), mask=m)
        tl.store(p_stats + o_l, b_mean, mask=m_l)
        tl.store(p_stats + total + o_l, b_rstd, mask=m_l)
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_n = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_n = b_x * b_rstd[:, None] * b_w[None, :] + b_n[None, :]
    if p_gate is not None:
        p_gate += _at(o_l, o_d, length, gate_sb, gate_sl, gate_sd)
        b_z = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
        b_n *= b_z * sigmoid(b_z)
    tl.store(p_out + o, b_n.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_SIZES)
def merge_norm_backward_kernel(
    p_dout, p_sum, p_stats, p_weight, p_bias, p_gate, p_dsum, p_dgate, p_dparameters,
    dout_sb, dout_sl, dout_sd, gate_sb, gate_sl, gate_sd,
    length, total, repeat, programs, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Gradients of the sum and the gate, and those of weight and bias over ``repeat`` tiles.

    p_dparameters is (2, programs, D), float32; a second pass adds it up in a fixed order.
    """
    pid = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, COLS)
    m_d = o_d < channels
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_b = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([ROWS, COLS], tl.float32)
    b_db = tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, repeat):
        o_l = (pid * repeat + r) * ROWS + tl.arange(0, ROWS)
        m_l = o_l < total
        m = m_l[:, None] & m_d[None, :]
        o = o_l[:, None] * channels + o_d[None, :]
        b_mean = tl.load(p_stats + o_l, mask=m_l, other=0.0)[:, None]
        b_rstd = tl.load(p_stats + total + o_l, mask=m_l, other=0.0)[:, None]
        b_x = (tl.load(p_sum + o, mask=m, other=0.0).to(tl.float32) - b_mean) * b_rstd
        o_dout = _at(o_l, o_d, length, dout_sb, dout_sl, dout_sd)
        b_g = tl.load(p_dout + o_dout, mask=m, other=0.0).to(tl.float32)
        if p_gate is not None:
            o_gate = _at(o_l, o_d, length, gate_sb, gate_sl, gate_sd)
            b_z = tl.load(p_gate + o_gate, mask=m, other=0.0).to(tl.float32)
            b_sig = sigmoid(b_z)
            b_dz = b_g * (b_x * b_w + b_b) * b_sig * (1.0 + b_z * (1.0 - b_sig))
            tl.store(p_dgate + o, b_dz.to(p_dgate.dtype.element_ty), mask=m)
            b_g *= b_z * b_sig
        b_dw += b_g * b_x
        b_db += b_g
        b_g *= b_w
        # Zeros of channels that are none have no part in either mean.
        b_ds = b_g - b_x * (tl.sum(b_g * b_x, axis=1) / channels)[:, None]
        b_ds = (b_ds - (tl.sum(b_g, axis=1) / channels)[:, None]) * b_rstd
        tl.store(p_dsum + o, b_ds.to(p_dsum.dtype.element_ty), mask=m)
    p_dparameters += pid * channels + o_d
    tl.store(p_dparameters, tl.sum(b_dw, axis=0), mask=m_d)
    tl.store(p_dparameters + programs.to(tl.int64) * channels, tl.sum(b_db, axis=0), mask=m_d)


@triton.jit
def _normed(b_y, m_d, channels, eps):
    """Tokens without their mean and deviation, and one over the deviation."""
    b_x = tl.where(m_d[None, :], b_y - (tl.sum(b_y, axis=1) / channels)[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
    return b_x * b_rstd, b_rstd


@triton.jit(do_not_specialize=_SIZES)
def token_sums_kernel(
    p_y, p_dsum, p_logit, p_sums, y_sb, y_sk, y_sl, y_sd,
    length, repeat, parts, channels, eps, share,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Sums over ``repeat`` tiles of tokens, (B, parts, K, D): what attention sees, or its gradient.

    Without p_dsum (B, L, D) it is the normed y_k times ``share``. With it, y_k times the gradient
    of the merged map and the slope of sigmoid(logit_k).
    """
    pid = tl.program_id(0).to(tl.int64)
    i_k = pid % K
    i_part = (pid // K) % parts
    i_b = pid // (K * parts)
    o_d = tl.arange(0, COLS)
    m_d = o_d < channels
    p_y += i_b * y_sb + i_k * y_sk + o_d[None, :] * y_sd
    b_sum = tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, repeat):
        o_l = (i_part * repeat + r) * ROWS + tl.arange(0, ROWS)
        m = (o_l < length)[:, None] & m_d[None, :]
        b_y = tl.load(p_y + o_l[:, None] * y_sl, mask=m, other=0.0).to(tl.float32)
        if p_dsum is not None:
            p = p_dsum + (i_b * length + o_l)[:, None] * channels + o_d[None, :]
            b_sum += b_y * tl.load(p, mask=m, other=0.0).to(tl.float32)
        else:
            b_x, _ = _normed(b_y, m_d, channels, eps)
            b_sum += b_x
    b_total = tl.sum(b_sum, axis=0)
    if p_dsum is not None:
        o_k = (i_b * K + i_k) * channels + o_d
        b_sig = sigmoid(tl.load(p_logit + o_k, mask=m_d, other=0.0))
        b_total *= b_sig * (1.0 - b_sig)
    else:
        b_total *= share
    tl.store(p_sums + ((i_b * parts + i_part) * K + i_k) * channels + o_d, b_total, mask=m_d)


@triton.jit(do_not_specialize=_SIZES)
def direction_gradients_kernel(
    p_y, p_dsum, p_logit, p_dmean, p_dy, y_sb, y_sk, y_sl, y_sd,
    length, tiles, channels, eps, share,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """dy (B, L, K, D): through the merged map, and through what attention saw of y.

    p_dmean (B, K, D) is the gradient of the mean over the tokens of the normed y_k.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_k = pid % K
    i_tile = (pid // K) % tiles
    i_b = pid // (K * tiles)
    o_d = tl.arange(0, COLS)
    o_l = i_tile * ROWS + tl.arange(0, ROWS)
    m_d = o_d < channels
    m = (o_l < length)[:, None] & m_d[None, :]
    o_k = (i_b * K + i_k) * channels + o_d
    p_y += i_b * y_sb + i_k * y_sk + o_d[None, :] * y_sd
    b_y = tl.load(p_y + o_l[:, None] * y_sl, mask=m, other=0.0).to(tl.float32)
    b_x, b_rstd = _normed(b_y, m_d, channels, eps)
    b_g = (tl.load(p_dmean + o_k, mask=m_d, other=0.0) * share)[None, :]
    b_dy = b_g - (tl.sum(b_g, axis=1) / channels)[:, None]
    b_dy = (b_dy - b_x * (tl.sum(b_g * b_x, axis=1) / channels)[:, None]) * b_rstd
    p = p_dsum + (i_b * length + o_l)[:, None] * channels + o_d[None, :]
    b_a = sigmoid(tl.load(p_logit + o_k, mask=m_d, other=0.0))[None, :]
    b_dy += b_a * tl.load(p, mask=m, other=0.0).to(tl.float32)
    p_dy += ((i_b * length + o_l) * K + i_k)[:, None] * channels + o_d[None, :]
    tl.store(p_dy, b_dy.to(p_dy.dtype.element_ty), mask=m)


globals().update(for_this_triton(globals()))
