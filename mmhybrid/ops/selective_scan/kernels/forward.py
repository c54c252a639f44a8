"""The forward kernel: one sweep over a chunk, in one of three modes."""

import triton
import triton.language as tl

from .common import (
    HOLES,
    LOG2E,
    SIZES,
    let_next_begin,
    load_as_is,
    load_channels,
    load_states,
    position_at,
    program_place,
    sigmoid,
    state_of,
    step_size,
    token_step,
    wait_for_previous,
)

# What one launch of the forward kernel is for.
SINGLE = tl.constexpr(0)  # the whole sequence from a zero state
AGGREGATE = tl.constexpr(1)  # end state and summed step of each chunk but the last, from zero
FINAL = tl.constexpr(2)  # every chunk again, from the state that the carry kernel left for it
FEW = tl.constexpr(3)  # every chunk again, from what the chunks before it added
# Chunks whose sums are in flight together.
_TOGETHER = tl.constexpr(2)


@triton.jit(do_not_specialize=SIZES)
def scan_forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_order, p_out, p_last, p_state, p_sum,
    p_start,
    u_sb, u_sg, u_sd, u_sl, delta_sb, delta_sg, delta_sd, delta_sl,
    B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, out_sb, out_sg, out_sd, out_sl, order_sg,
    group_dim, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MODE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
    PACK: tl.constexpr, AHEAD: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = sum_n C_t h_t + D u_t, out = y silu(z).

    p_state (B, NC, N, D) and p_sum (B, NC, D) are float32: AGGREGATE writes the end states of the
    chunks and their summed steps, none of the last chunk. FEW reads them and writes the states
    before the chunks to p_start (B, NC, N, D); FINAL reads the states before the chunks in p_state.
    p_last is (B, D, N).
    """
    u_sl = token_step(u_sl, WIDE)
    delta_sl = token_step(delta_sl, WIDE)
    B_sl = token_step(B_sl, WIDE)
    C_sl = token_step(C_sl, WIDE)
    z_sl = token_step(z_sl, WIDE)
    out_sl = token_step(out_sl, WIDE)
    # Nothing follows the last chunk, so nobody asks for what it adds.
    i_block, i_g, i_c, i_b = program_place(groups, n_chunks - (MODE == AGGREGATE), n_blocks)
    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h >= 0 if EVEN else o_h < group_dim  # the compiler knows the first one
    o_d = i_g * group_dim + o_h
    p_u += i_b * u_sb + i_g * u_sg + o_h * u_sd
    p_delta += i_b * delta_sb + i_g * delta_sg + o_h * delta_sd
    p_B += i_b * B_sb + i_g * B_sg
    p_C += i_b * C_sb + i_g * C_sg
    p_out += i_b * out_sb + i_g * out_sg + o_h * out_sd
    if HAS_Z:
        p_z += i_b * z_sb + i_g * z_sg + o_h * z_sd
    if ORDER:
        p_order += i_g * order_sg
    channels = groups.to(tl.int64) * group_dim
    p_sum += i_b * n_chunks * channels + o_d
    p_start += (i_b * n_chunks + i_c) * N * channels + o_d
    p_before = p_state + i_b * n_chunks * N * channels + o_d
    p_state = p_before + i_c * N * channels
    p_A += o_d * N

    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = load_channels(p_bias + o_d, m_d, EVEN)
    b_skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        b_skip = load_channels(p_D + o_d, m_d, EVEN)
    let_next_begin(OVERLAP)
    if MODE == FEW or MODE == FINAL:
        wait_for_previous(OVERLAP)
    b_A = ()
    b_h = ()
    for n in tl.static_range(N):
        b_A = b_A + (load_channels(p_A + n, m_d, EVEN) * LOG2E,)
        if MODE == FINAL:
            b_h = b_h + (load_channels(p_state + n * channels, m_d, EVEN),)
        else:
            b_h = b_h + (tl.zeros([BLOCK], tl.float32),)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if MODE == FEW:
        for c0 in range(0, i_c.to(tl.int32), _TOGETHER):
            sum_k = ()
            add_k = ()
            for k in tl.static_range(_TOGETHER):
                m_c = m_d & (c0 + k < i_c)
                sum_k = sum_k + (tl.load(p_sum + (c0 + k) * channels, mask=m_c, other=0.0),)
                add_n = ()
                for n in tl.static_range(N):
                    p_add = p_before + ((c0 + k) * N + n) * channels
                    add_n = add_n + (tl.load(p_add, mask=m_c, other=0.0),)
                add_k = add_k + (add_n,)
            for k in tl.static_range(_TOGETHER):
                b_next = ()
                for n in tl.static_range(N):
                    b_next = b_next + (tl.exp2(b_A[n] * sum_k[k]) * b_h[n] + add_k[k][n],)
                b_h = b_next
        for n in tl.static_range(N):
            tl.store(p_start + n * channels, b_h[n], mask=m_d)

    first = i_c.to(tl.int32) * chunk
    end = tl.minimum(first + chunk, length)
    # What the next AHEAD tokens need is loaded into registers while these are computed, and the
    # entries of a table that say where the tokens after those are. The loads come before the
    # stores: nothing tells the compiler that the output overlaps no input, so it moves no load
    # over a store. Behind the end of the chunk its last token repeats.
    entry_k = ()
    ahead_k = ()
    u_k = ()
    delta_k = ()
    z_k = ()
    B_k = ()
    C_k = ()
    for k in tl.static_range(AHEAD):
        token = position_at(first + k, end, length, REVERSE)
        if ORDER:
            entry_k = entry_k + (tl.load(p_order + token),)
            position = position_at(first + AHEAD + k, end, length, REVERSE)
            ahead_k = ahead_k + (tl.load(p_order + position),)
            token = entry_k[k]
            if ORDER == HOLES:
                token = tl.maximum(token, 0)
        u_k = u_k + (load_as_is(p_u + token * u_sl, m_d, EVEN),)
        delta_k = delta_k + (load_as_is(p_delta + token * delta_sl, m_d, EVEN),)
        B_k = B_k + (load_states(p_B + token * B_sl, B_sn, N, PACK),)
        if MODE != AGGREGATE:
            C_k = C_k + (load_states(p_C + token * C_sl, C_sn, N, PACK),)
            if HAS_Z:
                z_k = z_k + (load_as_is(p_z + token * z_sl, m_d, EVEN),)
    # Several groups of AHEAD tokens in one turn of the loop: each then has registers of its own,
    # and nothing is moved from the next ones to these.
    for turn in range(first, end, UNROLL):
        for group in tl.static_range(UNROLL // AHEAD):
            s0 = turn + group * AHEAD
            entry_next = ()
            ahead_next = ()
            u_next = ()
            delta_next = ()
            z_next = ()
            B_next = ()
            C_next = ()
            for k in tl.static_range(AHEAD):
                token = position_at(s0 + AHEAD + k, end, length, REVERSE)
                if ORDER:
                    entry_next = entry_next + (ahead_k[k],)
                    position = position_at(s0 + 2 * AHEAD + k, end, length, REVERSE)
                    ahead_next = ahead_next + (tl.load(p_order + position),)
                    token = ahead_k[k]
                    if ORDER == HOLES:
                        token = tl.maximum(token, 0)
                u_next = u_next + (load_as_is(p_u + token * u_sl, m_d, EVEN),)
                delta_next = delta_next + (load_as_is(p_delta + token * delta_sl, m_d, EVEN),)
                B_next = B_next + (load_states(p_B + token * B_sl, B_sn, N, PACK),)
                if MODE != AGGREGATE:
                    C_next = C_next + (load_states(p_C + token * C_sl, C_sn, N, PACK),)
                    if HAS_Z:
                        z_next = z_next + (load_as_is(p_z + token * z_sl, m_d, EVEN),)
            for k in tl.static_range(AHEAD):
                b_u = u_k[k].to(tl.float32)
                b_delta = delta_k[k].to(tl.float32)
                token = position_at(s0 + k, end, length, REVERSE)
                live = s0 + k < length
                if ORDER:
                    token = entry_k[k]
                if ORDER == HOLES:
                    token = tl.maximum(token, 0)
                    b_u = tl.where(entry_k[k] >= 0, b_u, 0.0)
                    b_delta = tl.where(entry_k[k] >= 0, b_delta, 0.0)
                # A step of zero leaves the state alone: that is all a ragged end needs.
                b_delta = step_size(b_delta, b_bias, HAS_BIAS, SOFTPLUS)
                b_delta = tl.where(live, b_delta, 0.0)
                b_x = b_delta * b_u
                b_y = b_skip * b_u
                b_next = ()
                for n in tl.static_range(N):
                    b_B = state_of(B_k[k], n, p_B.dtype.element_ty, PACK)
                    b_state = tl.exp2(b_A[n] * b_delta) * b_h[n] + b_x * b_B
                    b_next = b_next + (b_state,)
                    if MODE != AGGREGATE:
                        b_y += b_state * state_of(C_k[k], n, p_C.dtype.element_ty, PACK)
                b_h = b_next
                if MODE == AGGREGATE:
                    b_sum += b_delta
                else:
                    if HAS_Z:
                        b_z = z_k[k].to(tl.float32)
                        b_y = b_y * b_z * sigmoid(b_z)
                    if ORDER == HOLES:
                        live = live & (entry_k[k] >= 0)
                    p_y = p_out + token * out_sl
                    tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_d & live)
            entry_k = entry_next
            ahead_k = ahead_next
            u_k = u_next
            delta_k = delta_next
            z_k = z_next
            B_k = B_next
            C_k = C_next

    if MODE == AGGREGATE:
        for n in tl.static_range(N):
            tl.store(p_state + n * channels, b_h[n], mask=m_d)
        tl.store(p_sum + i_c * channels, b_sum, mask=m_d)
    else:
        p_last += (i_b * channels + o_d) * N
        for n in tl.static_range(N):
            tl.store(p_last + n, b_h[n], mask=m_d & (i_c == n_chunks - 1))
