"""Triton kernels of sum and norm: a tile is some tokens by all of their channels.

Names as in the kernels of the selective scan: ``p_`` pointers, ``i_`` indices, ``o_`` offsets,
``b_`` blocks, ``m_`` masks. Tensors are (B, L, C) with any strides: ``sb``, ``sl`` and ``sd`` stand
for theirs. Arithmetic is float32; offsets that grow with a tensor's size are int64.
"""

import triton
import triton.language as tl

from ..unrolled import for_this_triton

_SIZES = ['length', 'tiles', 'total', 'repeat', 'programs']


@triton.jit
def _tile(i_b, o_l, o_d, sb, sl, sd):
    """Offsets of a tile in a tensor with these strides."""
    return i_b * sb + o_l[:, None] * sl + o_d[None, :] * sd


@triton.jit
def _inside(o_l, length, WHOLE: tl.constexpr):
    """Which tokens of a tile there are; where tiles are whole, neighbours can travel together."""
    if WHOLE:
        return o_l >= 0
    return o_l < length


@triton.jit(do_not_specialize=_SIZES)
def add_norm_kernel(
    p_x, p_branch, p_scale, p_factor, p_weight, p_bias, p_sum, p_out, p_stats,
    x_sb, x_sl, x_sd, branch_sb, branch_sl, branch_sd, sum_sb, sum_sl, sum_sd,
    out_sb, out_sl, out_sd, length, tiles, total, channels,
    EPS: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """sum = x + factor_b * scale_d * branch, out = norm(sum); without a branch the norm of x.

    p_stats is (2, B * L), float32: mean (not with RMS) and inverse deviation of every token.
    """
    pid = tl.program_id(0)
    i_b = (pid // tiles).to(tl.int64)
    o_l = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, COLS).to(tl.int64)
    m_l, m_d = _inside(o_l, length, WHOLE), o_d < channels
    m_x = m_l[:, None] & m_d[None, :]
    b_x = tl.load(p_x + _tile(i_b, o_l, o_d, x_sb, x_sl, x_sd), mask=m_x, other=0.0)
    b_x = b_x.to(tl.float32)
    if p_branch is not None:
        o_branch = _tile(i_b, o_l, o_d, branch_sb, branch_sl, branch_sd)
        b_y = tl.load(p_branch + o_branch, mask=m_x, other=0.0).to(tl.float32)
        if p_scale is not None:
            b_y *= tl.load(p_scale + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if p_factor is not None:
            b_y *= tl.load(p_factor + i_b).to(tl.float32)
        # The norm is that of the sum as it is stored, of which the backward pass starts.
        b_sum = (b_x + b_y).to(p_sum.dtype.element_ty)
        tl.store(p_sum + _tile(i_b, o_l, o_d, sum_sb, sum_sl, sum_sd), b_sum, mask=m_x)
        b_x = b_sum.to(tl.float32)
    i_row = i_b * length + o_l
    if not RMS:
        b_mean = tl.sum(b_x, axis=1) / channels
        if p_stats is not None:
            tl.store(p_stats + i_row, b_mean, mask=m_l)
        b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + EPS)
    if p_stats is not None:
        tl.store(p_stats + total + i_row, b_rstd, mask=m_l)
    b_x *= b_rstd[:, None]
    b_x *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_bias is not None:
        b_x += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    p_out += _tile(i_b, o_l, o_d, out_sb, out_sl, out_sd)
    tl.store(p_out, b_x.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=_SIZES)
def add_norm_backward_kernel(
    p_dout, p_dsum, p_sum, p_stats, p_branch, p_scale, p_factor, p_weight,
    p_dx, p_dbranch, p_dparameters,
    dout_sb, dout_sl, dout_sd, dsum_sb, dsum_sl, dsum_sd, sum_sb, sum_sl, sum_sd,
    branch_sb, branch_sl, branch_sd, dx_sb, dx_sl, dx_sd, dbranch_sb, dbranch_sl, dbranch_sd,
    length, tiles, total, repeat, programs, channels,
    RMS: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr,
):
    """Gradients of x and branch, and sums of those of weight, bias and scale over some tiles.

    p_dparameters is (1 to 3, programs, C), float32: weight, WITH_BIAS bias, WITH_SCALE scale. A
    second pass adds it up in a fixed order. KEPT is ROWS, or 1 where sums over a tile's tokens are
    made at once because a sum for each of them takes too many registers.
    """
    pid = tl.program_id(0)
    o_d = tl.arange(0, COLS).to(tl.int64)
    m_d = o_d < channels
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_scale is not None:
        b_scale = tl.load(p_scale + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([KEPT, COLS], tl.float32)
    b_db = tl.zeros([KEPT, COLS], tl.float32)
    b_ds = tl.zeros([KEPT, COLS], tl.float32)
    for r in range(0, repeat):
        i_tile = pid * repeat + r
        i_b = (i_tile // tiles).to(tl.int64)
        o_l = (i_tile % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        # The last program may have less than the others to do.
        m_l = _inside(o_l, length, WHOLE) & (i_b * length < total)
        m_x = m_l[:, None] & m_d[None, :]
        i_row = i_b * length + o_l
        b_rstd = tl.load(p_stats + total + i_row, mask=m_l, other=0.0)[:, None]
        b_x = tl.load(p_sum + _tile(i_b, o_l, o_d, sum_sb, sum_sl, sum_sd), mask=m_x, other=0.0)
        b_x = b_x.to(tl.float32)
        if not RMS:
            b_x -= tl.load(p_stats + i_row, mask=m_l, other=0.0)[:, None]
        b_x *= b_rstd
        o_dout = _tile(i_b, o_l, o_d, dout_sb, dout_sl, dout_sd)
        b_g = tl.load(p_dout + o_dout, mask=m_x, other=0.0).to(tl.float32)
        if p_dparameters is not None:
            if KEPT == 1:
                b_dw += tl.sum(b_g * b_x, axis=0)[None, :]
                b_db += tl.sum(b_g, axis=0)[None, :]
            else:
                b_dw += b_g * b_x
                b_db += b_g
        b_g *= b_w
        # Zeros of channels that are none have no part in either mean.
        b_dx = b_g - b_x * (tl.sum(b_g * b_x, axis=1) / channels)[:, None]
        if not RMS:
            b_dx -= (tl.sum(b_g, axis=1) / channels)[:, None]
        b_dx *= b_rstd
        if p_dsum is not None:
            o_dsum = _tile(i_b, o_l, o_d, dsum_sb, dsum_sl, dsum_sd)
            b_dx += tl.load(p_dsum + o_dsum, mask=m_x, other=0.0).to(tl.float32)
        if p_dx is not None:
            o_dx = _tile(i_b, o_l, o_d, dx_sb, dx_sl, dx_sd)
            tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
        if p_factor is not None:
            b_dx *= tl.load(p_factor + i_b, mask=i_b * length < total, other=0.0).to(tl.float32)
        if WITH_SCALE:
            o_branch = _tile(i_b, o_l, o_d, branch_sb, branch_sl, branch_sd)
            b_y = tl.load(p_branch + o_branch, mask=m_x, other=0.0).to(tl.float32)
            if KEPT == 1:
                b_ds += tl.sum(tl.where(m_x, b_dx * b_y, 0.0), axis=0)[None, :]
            else:
                b_ds += tl.where(m_x, b_dx * b_y, 0.0)
        if p_dbranch is not None:
            if p_scale is not None:
                b_dx *= b_scale
            o_dbranch = _tile(i_b, o_l, o_d, dbranch_sb, dbranch_sl, dbranch_sd)
            tl.store(p_dbranch + o_dbranch, b_dx.to(p_dbranch.dtype.element_ty), mask=m_x)
    if p_dparameters is not None:
        p_dparameters += pid.to(tl.int64) * channels + o_d
        step = programs.to(tl.int64) * channels
        tl.store(p_dparameters, tl.sum(b_dw, axis=0), mask=m_d)
        if WITH_BIAS:
            p_dparameters += step
            tl.store(p_dparameters, tl.sum(b_db, axis=0), mask=m_d)
        if WITH_SCALE:
            tl.store(p_dparameters + step, tl.sum(b_ds, axis=0), mask=m_d)


globals().update(for_this_triton(globals()))
