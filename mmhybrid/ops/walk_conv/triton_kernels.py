"""Triton kernels of the convolution along walks: a tile is some steps of a walk by some channels.

Names as in the kernels of the selective scan: ``p_`` pointers, ``i_`` indices, ``o_`` offsets,
``b_`` blocks, ``m_`` masks. B batch, K walks, E channels, L tokens, S steps of a walk, T taps.
Arithmetic is float32; offsets that grow with a tensor's size are int64.
"""

import triton
import triton.language as tl

from ..selective_scan.kernels.common import sigmoid
from ..unrolled import for_this_triton

_SIZES = ['batch', 'walks', 'tokens', 'steps', 'tiles']


@triton.jit
def _visited(p_slots, o_s, steps):
    """Place visited at each step; steps before the first have none (-1)."""
    inside = (o_s >= 0) & (o_s < steps)
    return tl.load(p_slots + o_s, mask=inside, other=-1).to(tl.int64)


@triton.jit
def _taps(p_u, p_weight, p_bias, p_slots, u_sl, u_sd, o_s, o_d, m_d, tokens, steps,
          T: tl.constexpr):
    """The convolution at steps o_s, and the values under its taps; no token reads as zero."""
    b_c = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    x_j = ()
    for j in tl.static_range(T):
        slot = _visited(p_slots, o_s - (T - 1) + j, steps)
        m_x = ((slot >= 0) & (slot < tokens))[:, None] & m_d[None, :]
        b_x = tl.load(p_u + slot[:, None] * u_sl + o_d[None, :] * u_sd, mask=m_x, other=0.0)
        b_w = tl.load(p_weight + o_d * T + j, mask=m_d, other=0.0).to(tl.float32)
        b_c = b_c + b_x.to(tl.float32) * b_w[None, :]
        x_j = x_j + (b_x.to(tl.float32),)
    return b_c, x_j


@triton.jit(do_not_specialize=_SIZES)
def walk_conv_kernel(
    p_u, p_weight, p_bias, p_slots, p_out,
    u_sb, u_sl, u_sd, batch, walks, channels, tokens, steps, tiles, blocks,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """out[slot(s)] = silu(bias + sum_j w_j u[slot(s - T + 1 + j)]); p_out is (K, B, S, E)."""
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks
    i_tile = (pid // blocks) % tiles
    i_b = (pid // (blocks * tiles)) % batch
    i_k = pid // (blocks * tiles * batch)
    o_d = i_block * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    o_s = i_tile * ROWS + tl.arange(0, ROWS)
    p_slots += i_k * steps
    b_c, _ = _taps(
        p_u + i_b * u_sb, p_weight + i_k * channels * T, p_bias + i_k * channels, p_slots, u_sl,
        u_sd, o_s, o_d, m_d, tokens, steps, T,
    )
    slot = _visited(p_slots, o_s, steps)
    p_out += ((i_k * batch + i_b) * steps + slot)[:, None] * channels + o_d[None, :]
    b_y = b_c * sigmoid(b_c)
    tl.store(p_out, b_y.to(p_out.dtype.element_ty), mask=(slot >= 0)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=_SIZES)
def walk_conv_weights_kernel(
    p_u, p_weight, p_bias, p_slots, p_dout, p_g, p_sums,
    u_sb, u_sl, u_sd, dout_sk, dout_sb, dout_sl, dout_sd,
    batch, walks, channels, tokens, steps, tiles, blocks,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, REPEAT: tl.constexpr,
):
    """Gradient before the SiLU, and its sums over REPEAT tiles for taps and bias.

    p_g is (K, B, S, E) like the output; p_sums is (K, B * tiles, T + 1, E), float32: a second pass
    adds it up in a fixed order.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks
    i_tile = (pid // blocks) % tiles
    i_b = (pid // (blocks * tiles)) % batch
    i_k = pid // (blocks * tiles * batch)
    o_d = i_block * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    p_slots += i_k * steps
    p_u += i_b * u_sb
    p_weight += i_k * channels * T
    p_bias += i_k * channels
    p_dout += i_k * dout_sk + i_b * dout_sb
    p_g += (i_k * batch + i_b) * steps * channels
    sums = ()
    for _ in tl.static_range(T + 1):
        sums = sums + (tl.zeros([ROWS, COLS], tl.float32),)
    for r in range(0, REPEAT):
        o_s = (i_tile * REPEAT + r) * ROWS + tl.arange(0, ROWS)
        b_c, x_j = _taps(p_u, p_weight, p_bias, p_slots, u_sl, u_sd, o_s, o_d, m_d, tokens, steps,
                         T)
        slot = _visited(p_slots, o_s, steps)
        m_y = (slot >= 0)[:, None] & m_d[None, :]
        o_dout = slot[:, None] * dout_sl + o_d[None, :] * dout_sd
        b_g = tl.load(p_dout + o_dout, mask=m_y, other=0.0)
        b_sig = sigmoid(b_c)
        b_g = b_g.to(tl.float32) * b_sig * (1.0 + b_c * (1.0 - b_sig))
        p = p_g + slot[:, None] * channels + o_d[None, :]
        tl.store(p, b_g.to(p_g.dtype.element_ty), mask=m_y)
        new = ()
        for j in tl.static_range(T):
            new = new + (sums[j] + b_g * x_j[j],)
        sums = new + (sums[T] + b_g,)
    p_sums += ((i_k * batch + i_b) * tiles + i_tile) * (T + 1) * channels + o_d
    for j in tl.static_range(T + 1):
        tl.store(p_sums + j * channels, tl.sum(sums[j], axis=0), mask=m_d)


@triton.jit(do_not_specialize=_SIZES)
def walk_conv_input_kernel(
    p_g, p_weight, p_slots, p_steps, p_du, du_sl,
    batch, walks, channels, tokens, steps, tiles, blocks,
    T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """p_du (B, L, E): what every walk's later steps took from a token, summed over the walks.

    Rows of p_du are du_sl values apart.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks
    i_tile = (pid // blocks) % tiles
    i_b = pid // (blocks * tiles)
    o_d = i_block * COLS + tl.arange(0, COLS)
    m_d = o_d < channels
    o_t = i_tile * ROWS + tl.arange(0, ROWS)
    m_t = o_t < tokens
    b_du = tl.zeros([ROWS, COLS], tl.float32)
    size = batch.to(tl.int64) * steps * channels
    p_g += i_b * steps * channels
    p_weight += o_d * T
    for _ in range(0, walks):
        o_s = tl.load(p_steps + o_t, mask=m_t, other=steps)
        for j in tl.static_range(T):
            slot = _visited(p_slots, o_s + T - 1 - j, steps)
            m_g = (slot >= 0)[:, None] & m_d[None, :]
            b_g = tl.load(p_g + slot[:, None] * channels + o_d[None, :], mask=m_g, other=0.0)
            b_w = tl.load(p_weight + j, mask=m_d, other=0.0).to(tl.float32)
            b_du += b_g.to(tl.float32) * b_w[None, :]
        p_steps += steps
        p_slots += steps
        p_g += size
        p_weight += channels * T
    p_du += (i_b * tokens + o_t)[:, None] * du_sl + o_d[None, :]
    tl.store(p_du, b_du.to(p_du.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


globals().update(for_this_triton(globals()))
