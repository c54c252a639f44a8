"""The backward kernels: the forward sweep mirrored, all gradients of a chunk, and their sums.

Nothing tells the compiler that a store overlaps no input, so it moves no load over a store, and a
load that waits for its use costs a trip to memory per run. So all sweeps go in runs of K tokens,
and load what a run reads one run ahead: its values while the run before it is computed, its entries
of the table of tokens another run ahead of that. Values are carried as they lie in memory.
"""

import triton
import triton.language as tl

from .common import (
    HOLES,
    LOG2E,
    SIZES,
    entries_at,
    let_next_begin,
    load_as_is,
    load_channels,
    load_states,
    program_place,
    sigmoid,
    state_of_late,
    step_size,
    token_of,
    token_step,
    wait_for_previous,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_parameters(
    p_A, p_bias, o_d, m_d, N: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr
):
    """Rates in units of the base two, and the bias of the step."""
    b_A = ()
    for n in tl.static_range(N):
        b_A = b_A + (load_channels(p_A + o_d * N + n, m_d, EVEN) * LOG2E,)
    if HAS_BIAS:
        return b_A, load_channels(p_bias + o_d, m_d, EVEN)
    else:
        return b_A, tl.zeros(o_d.shape, tl.float32)


@triton.jit
def load_run(
    p, stride, entry_k, s0, length, m_d,
    K: tl.constexpr, ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):
    """The channels of a run of tokens, as they lie in memory."""
    raw_k = ()
    for k in tl.static_range(K):
        token, _ = token_of(entry_k[k], s0 + k, length, ORDER, REVERSE)
        raw_k = raw_k + (load_as_is(p + token * stride, m_d, EVEN),)
    return raw_k


@triton.jit
def load_inputs(
    p_u, p_delta, p_dout, p_z, u_sl, delta_sl, dout_sl, z_sl, entry_k, s0, length, m_d,
    K: tl.constexpr, HAS_Z: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):
    """u, delta, the gradient of the output and the gate of a run, as they lie in memory."""
    u_raw = load_run(p_u, u_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
    delta_raw = load_run(p_delta, delta_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
    dout_raw = load_run(p_dout, dout_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
    if HAS_Z:
        z_raw = load_run(p_z, z_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
        return u_raw, delta_raw, dout_raw, z_raw
    else:
        return u_raw, delta_raw, dout_raw, dout_raw


@triton.jit
def load_run_states(
    p, step, stride, entry_k, s0, length,
    K: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr,
):
    """N values of B or C for each token of a run, as they lie in memory."""
    words_k = ()
    for k in tl.static_range(K):
        token, _ = token_of(entry_k[k], s0 + k, length, ORDER, REVERSE)
        words_k = words_k + (load_states(p + token * stride, step, N, PACK),)
    return words_k


@triton.jit
def steps_of_run(
    raw_k, entry_k, b_bias, s0, length, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ORDER: tl.constexpr,
):
    """Step sizes of a run. Behind the end the step is zero, which leaves the state alone."""
    delta_k = ()
    for k in tl.static_range(K):
        b_delta = raw_k[k].to(tl.float32)
        if ORDER == HOLES:
            b_delta = tl.where(entry_k[k] >= 0, b_delta, 0.0)
        b_delta = step_size(b_delta, b_bias, HAS_BIAS, SOFTPLUS)
        delta_k = delta_k + (tl.where(s0 + k < length, b_delta, 0.0),)
    return delta_k


@triton.jit
def inputs_of_run(raw_k, entry_k, K: tl.constexpr, ORDER: tl.constexpr):
    """u of a run; a hole of the table is a token of zeros."""
    u_k = ()
    for k in tl.static_range(K):
        b_u = raw_k[k].to(tl.float32)
        if ORDER == HOLES:
            b_u = tl.where(entry_k[k] >= 0, b_u, 0.0)
        u_k = u_k + (b_u,)
    return u_k


@triton.jit
def slopes_of_run(
    dout_k, z_k, entry_k, s0, length,
    K: tl.constexpr, HAS_Z: tl.constexpr, ORDER: tl.constexpr,
):
    """Gradients of y, which is the output before the gate, for a run."""
    dy_k = ()
    for k in tl.static_range(K):
        b_dy = dout_k[k].to(tl.float32)
        if HAS_Z:
            b_z = z_k[k].to(tl.float32)
            b_dy = b_dy * b_z * sigmoid(b_z)
        live = s0 + k < length
        if ORDER == HOLES:
            live = live & (entry_k[k] >= 0)
        dy_k = dy_k + (tl.where(live, b_dy, 0.0),)
    return dy_k


@triton.jit(do_not_specialize=SIZES)
def scan_backward_aggregate_kernel(
    p_delta, p_A, p_C, p_z, p_bias, p_order, p_dout, p_state, p_sum,
    delta_sb, delta_sg, delta_sd, delta_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, dout_sb, dout_sg, dout_sd, dout_sl, order_sg,
    group_dim, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):
    """What each chunk but the first adds to the gradient of the state before it, and its step.

    The mirror of the forward AGGREGATE: g_t = exp(dt_t A) (g_{t+1} + dy_t C_t), from the right.
    """
    delta_sl = token_step(delta_sl, WIDE)
    C_sl = token_step(C_sl, WIDE)
    z_sl = token_step(z_sl, WIDE)
    dout_sl = token_step(dout_sl, WIDE)
    let_next_begin(OVERLAP)
    # Nothing comes before the first chunk, so nobody asks for what it adds.
    i_block, i_g, i_c, i_b = program_place(groups, n_chunks - 1, n_blocks)
    i_c += 1
    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h < group_dim
    o_d = i_g * group_dim + o_h
    channels = groups.to(tl.int64) * group_dim
    p_delta += i_b * delta_sb + i_g * delta_sg + o_h * delta_sd
    p_C += i_b * C_sb + i_g * C_sg
    p_dout += i_b * dout_sb + i_g * dout_sg + o_h * dout_sd
    if HAS_Z:
        p_z += i_b * z_sb + i_g * z_sg + o_h * z_sd
    if ORDER:
        p_order += i_g * order_sg
    b_A, b_bias = load_parameters(p_A, p_bias, o_d, m_d, N, HAS_BIAS, EVEN)
    b_g = ()
    for _ in tl.static_range(N):
        b_g = b_g + (tl.zeros([BLOCK], tl.float32),)
    b_sum = tl.zeros([BLOCK], tl.float32)

    first = i_c.to(tl.int32) * chunk
    n_runs = tl.cdiv(tl.minimum(chunk, length - first), K)
    s0 = first + (n_runs - 1) * K
    entry_k = entries_at(p_order, s0, length, K, ORDER, REVERSE)
    delta_raw = load_run(p_delta, delta_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
    dout_raw = load_run(p_dout, dout_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
    z_raw = dout_raw
    if HAS_Z:
        z_raw = load_run(p_z, z_sl, entry_k, s0, length, m_d, K, ORDER, REVERSE, EVEN)
    C_raw = load_run_states(p_C, C_sn, C_sl, entry_k, s0, length, K, N, PACK, ORDER, REVERSE)
    ahead_k = entries_at(p_order, s0 - K, length, K, ORDER, REVERSE)
    for i in range(0, n_runs):
        s0 = first + (n_runs - 1 - i) * K
        s1 = s0 - K
        further_k = entries_at(p_order, s1 - K, length, K, ORDER, REVERSE)
        delta_next = load_run(p_delta, delta_sl, ahead_k, s1, length, m_d, K, ORDER, REVERSE, EVEN)
        dout_next = load_run(p_dout, dout_sl, ahead_k, s1, length, m_d, K, ORDER, REVERSE, EVEN)
        z_next = dout_next
        if HAS_Z:
            z_next = load_run(p_z, z_sl, ahead_k, s1, length, m_d, K, ORDER, REVERSE, EVEN)
        C_next = load_run_states(p_C, C_sn, C_sl, ahead_k, s1, length, K, N, PACK, ORDER, REVERSE)
        delta_k = steps_of_run(
            delta_raw, entry_k, b_bias, s0, length, K, HAS_BIAS, SOFTPLUS, ORDER
        )
        dy_k = slopes_of_run(dout_raw, z_raw, entry_k, s0, length, K, HAS_Z, ORDER)
        for j in tl.static_range(K):
            b_next = ()
            for n in tl.static_range(N):
                b_C = state_of_late(C_raw[K - 1 - j], n, p_C.dtype.element_ty, PACK)
                b_decay = tl.exp2(b_A[n] * delta_k[K - 1 - j])
                b_next = b_next + (b_decay * (b_g[n] + dy_k[K - 1 - j] * b_C),)
            b_g = b_next
            b_sum += delta_k[K - 1 - j]
        entry_k = ahead_k
        ahead_k = further_k
        delta_raw = delta_next
        dout_raw = dout_next
        z_raw = z_next
        C_raw = C_next

    p_state += (i_b * n_chunks + i_c) * N * channels + o_d
    for n in tl.static_range(N):
        tl.store(p_state + n * channels, b_g[n], mask=m_d)
    tl.store(p_sum + (i_b * n_chunks + i_c) * channels + o_d, b_sum, mask=m_d)


@triton.jit
def note_states(
    b_h, p_u, p_delta, p_B, p_order, p_scratch, u_sl, delta_sl, B_sn, B_sl,
    b_A, b_bias, m_d, first, n_runs, length,
    N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, PACK: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):
    """Go forwards through a chunk from the states b_h, note those before every run in p_scratch."""
    entry_k = entries_at(p_order, first, length, K, ORDER, REVERSE)
    u_raw = load_run(p_u, u_sl, entry_k, first, length, m_d, K, ORDER, REVERSE, EVEN)
    delta_raw = load_run(p_delta, delta_sl, entry_k, first, length, m_d, K, ORDER, REVERSE, EVEN)
    B_raw = load_run_states(p_B, B_sn, B_sl, entry_k, first, length, K, N, PACK, ORDER, REVERSE)
    ahead_k = entries_at(p_order, first + K, length, K, ORDER, REVERSE)
    for i in range(0, n_runs - 1):
        s0 = first + i * K
        s1 = s0 + K
        further_k = entries_at(p_order, s1 + K, length, K, ORDER, REVERSE)
        u_next = load_run(p_u, u_sl, ahead_k, s1, length, m_d, K, ORDER, REVERSE, EVEN)
        delta_next = load_run(p_delta, delta_sl, ahead_k, s1, length, m_d, K, ORDER, REVERSE, EVEN)
        B_next = load_run_states(p_B, B_sn, B_sl, ahead_k, s1, length, K, N, PACK, ORDER, REVERSE)
        for n in tl.static_range(N):
            tl.store(p_scratch + (s0 // K * N + n) * BLOCK, b_h[n])
        delta_k = steps_of_run(
            delta_raw, entry_k, b_bias, s0, length, K, HAS_BIAS, SOFTPLUS, ORDER
        )
        u_k = inputs_of_run(u_raw, entry_k, K, ORDER)
        for k in tl.static_range(K):
            b_x = delta_k[k] * u_k[k]
            b_next = ()
            for n in tl.static_range(N):
                b_B = state_of_late(B_raw[k], n, p_B.dtype.element_ty, PACK)
                b_next = b_next + (tl.exp2(b_A[n] * delta_k[k]) * b_h[n] + b_x * b_B,)
            b_h = b_next
        entry_k = ahead_k
        ahead_k = further_k
        u_raw = u_next
        delta_raw = delta_next
        B_raw = B_next
    for n in tl.static_range(N):
        tl.store(p_scratch + ((first // K + n_runs - 1) * N + n) * BLOCK, b_h[n])


@triton.jit
def adjoint_at_end(
    p_gstate, p_dlast, o_chunk, o_channel, channels, m_d,
    N: tl.constexpr, CHUNKED: tl.constexpr, HAS_DLAST: tl.constexpr, EVEN: tl.constexpr,
):
    """The gradient of the state that leaves a chunk, for every state."""
    b_g = ()
    for n in tl.static_range(N):
        if CHUNKED:
            b_g = b_g + (load_channels(p_gstate + o_chunk + n * channels, m_d, EVEN),)
        elif HAS_DLAST:
            b_g = b_g + (load_channels(p_dlast + o_channel * N + n, m_d, EVEN),)
        else:
            b_g = b_g + (tl.zeros(o_channel.shape, tl.float32),)
    return b_g


@triton.jit
def fold(b_a, b_b, PARTS: tl.constexpr):
    """Two blocks of PARTS sums each become one of 2 PARTS, each sum spread over half the lanes.

    Lane (rest, half, part) of both becomes lane (rest, which of the two, part): one exchange
    between lanes, where a sum of each block alone would take two.
    """
    b_both = tl.reshape(tl.join(b_a, b_b), [16 // PARTS, 2, PARTS, 2])
    b_left, b_right = tl.split(tl.reshape(tl.permute(b_both, [0, 3, 2, 1]), [32, 2]))
    return b_left + b_right


@triton.jit
def sums_over_channels(x, BLOCK: tl.constexpr):
    """Sums of eight blocks as one block of eight, with nine exchanges between lanes, not forty."""
    tl.static_assert(len(x) == 8)
    if BLOCK > 32:  # a lane has two neighbours
        halves = ()
        for i in tl.static_range(8):
            halves = halves + (tl.sum(tl.reshape(x[i], [32, BLOCK // 32]), axis=1),)
        x = halves
    b_0123 = fold(fold(x[0], x[1], 1), fold(x[2], x[3], 1), 2)
    b_4567 = fold(fold(x[4], x[5], 1), fold(x[6], x[7], 1), 2)
    return tl.sum(tl.reshape(fold(b_0123, b_4567, 4), [4, 8]), axis=0)


@triton.jit
def behind(line, done, N: tl.constexpr, SOME: tl.constexpr):
    """A line of N of which the first SOME are done, with those behind the others."""
    found = ()
    for n in tl.static_range(SOME, N):
        found = found + (line[n],)
    for n in tl.static_range(SOME):
        found = found + (done[n],)
    return found


@triton.jit
def slope_of_softplus(y):
    """The derivative of softplus where its value is y: 1 - exp(-y), a series where that cancels."""
    p = 1.0 / 120.0 - y * (1.0 / 720.0)
    p = p * y - 1.0 / 24.0
    p = p * y + 1.0 / 6.0
    p = p * y - 1.0 / 2.0
    p = p * y + 1.0
    return tl.where(y < 0.25, y * p, 1.0 - tl.exp2(y * -LOG2E))


@triton.jit
def gradients_of_state(
    b_A, b_state, b_g, b_dA, B_k, C_k, delta_k, x_k, dy_k, dx_k, dd_k, y_k,
    K: tl.constexpr, HAS_Z: tl.constexpr,
):
    """One state of a run: its values again from the left, then all its gradients from the right.

    Returns the gradients of the state before the run and of A, what is summed over the states (the
    gradients of x and of the decay's exponent over A, y before the skip), and what is to be summed
    over the channels: dC of the K tokens, then dB.
    """
    decay_k = ()
    before_k = ()
    dC_k = ()
    ynew_k = ()
    for k in tl.static_range(K):
        b_decay = tl.exp2(b_A * delta_k[k])
        b_state = b_decay * b_state
        decay_k = decay_k + (b_decay,)
        before_k = before_k + (b_state,)
        b_state += x_k[k] * B_k[k]
        dC_k = dC_k + (dy_k[k] * b_state,)
        if HAS_Z:
            ynew_k = ynew_k + (y_k[k] + C_k[k] * b_state,)
        else:
            ynew_k = ynew_k + (y_k[k],)
    dB_k = ()
    dxnew_k = ()
    ddnew_k = ()
    for j in tl.static_range(K):
        b_g += dy_k[K - 1 - j] * C_k[K - 1 - j]
        dB_k = (b_g * x_k[K - 1 - j],) + dB_k
        b_q = b_g * before_k[K - 1 - j]
        b_dA += b_q * delta_k[K - 1 - j]
        dxnew_k = (dx_k[K - 1 - j] + b_g * B_k[K - 1 - j],) + dxnew_k
        ddnew_k = (dd_k[K - 1 - j] + b_q * b_A,) + ddnew_k
        b_g = b_g * decay_k[K - 1 - j]
    return b_g, b_dA, dxnew_k, ddnew_k, ynew_k, dC_k + dB_k


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_order, p_dout,
    p_state, p_gstate, p_dlast, p_scratch, p_du, p_ddelta, p_dz, p_dbc, p_dchannel,
    u_sb, u_sg, u_sd, u_sl, delta_sb, delta_sg, delta_sd, delta_sl,
    B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, dout_sb, dout_sg, dout_sd, dout_sl,
    du_sb, du_sg, du_sd, du_sl, ddelta_sb, ddelta_sg, ddelta_sd, ddelta_sl,
    dz_sb, dz_sg, dz_sd, dz_sl, order_sg,
    group_dim, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    PACK: tl.constexpr, WIDE: tl.constexpr, SOME: tl.constexpr,
    CHUNKED: tl.constexpr, HAS_DLAST: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):
    """All gradients of one chunk.

    A first sweep stores the state at every K-th token in p_scratch, (B, G, blocks, ceil(L / K), N,
    BLOCK); the second goes back over the runs of K tokens and rebuilds their states in registers.
    The sums over channels go to p_dbc (B, G, blocks, ceil(L / K), N, 2 K), dC of a run's tokens
    before their dB, and the sums over tokens to p_dchannel (B, NC, N + 2, D) (A, D, the bias).
    A second pass adds them up in a fixed order: no atomics, so every run gives the same bits.
    p_gstate (B, NC, N, D) holds the gradient of the state that leaves each chunk.
    """
    u_sl = token_step(u_sl, WIDE)
    delta_sl = token_step(delta_sl, WIDE)
    B_sl = token_step(B_sl, WIDE)
    C_sl = token_step(C_sl, WIDE)
    z_sl = token_step(z_sl, WIDE)
    dout_sl = token_step(dout_sl, WIDE)
    du_sl = token_step(du_sl, WIDE)
    ddelta_sl = token_step(ddelta_sl, WIDE)
    dz_sl = token_step(dz_sl, WIDE)
    i_block, i_g, i_c, i_b = program_place(groups, n_chunks, n_blocks)
    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h >= 0 if EVEN else o_h < group_dim  # the compiler knows the first one
    o_d = i_g * group_dim + o_h
    channels = groups.to(tl.int64) * group_dim
    p_u += i_b * u_sb + i_g * u_sg + o_h * u_sd
    p_delta += i_b * delta_sb + i_g * delta_sg + o_h * delta_sd
    p_B += i_b * B_sb + i_g * B_sg
    p_C += i_b * C_sb + i_g * C_sg
    p_dout += i_b * dout_sb + i_g * dout_sg + o_h * dout_sd
    p_du += i_b * du_sb + i_g * du_sg + o_h * du_sd
    p_ddelta += i_b * ddelta_sb + i_g * ddelta_sg + o_h * ddelta_sd
    if HAS_Z:
        p_z += i_b * z_sb + i_g * z_sg + o_h * z_sd
        p_dz += i_b * dz_sb + i_g * dz_sg + o_h * dz_sd
    if ORDER:
        p_order += i_g * order_sg
    runs = tl.cdiv(length, K)
    o_runs = ((i_b * groups + i_g) * n_blocks + i_block) * runs * N
    p_scratch += o_runs * BLOCK + tl.arange(0, BLOCK)
    p_dbc += o_runs * 2 * K + tl.arange(0, 2 * K)
    o_chunk = (i_b * n_chunks + i_c) * N * channels + o_d
    p_dchannel += (i_b * n_chunks + i_c) * (N + 2) * channels + o_d

    b_A, b_bias = load_parameters(p_A, p_bias, o_d, m_d, N, HAS_BIAS, EVEN)
    b_skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        b_skip = load_channels(p_D + o_d, m_d, EVEN)
    b_h = ()
    for n in tl.static_range(N):
        if CHUNKED:
            b_h = b_h + (load_channels(p_state + o_chunk + n * channels, m_d, EVEN),)
        else:
            b_h = b_h + (tl.zeros([BLOCK], tl.float32),)
    first = i_c.to(tl.int32) * chunk
    n_runs = tl.cdiv(tl.minimum(chunk, length - first), K)
    let_next_begin(OVERLAP)
    # The first sweep needs nothing of the launch before, but the compiler makes shorter loops when
    # all is loaded ahead of it.
    if not OVERLAP:
        b_g = adjoint_at_end(
            p_gstate, p_dlast, o_chunk, i_b * channels + o_d, channels, m_d,
            N, CHUNKED, HAS_DLAST, EVEN,
        )
    note_states(
        b_h, p_u, p_delta, p_B, p_order, p_scratch, u_sl, delta_sl, B_sn, B_sl,
        b_A, b_bias, m_d, first, n_runs, length,
        N, BLOCK, K, PACK, HAS_BIAS, SOFTPLUS, ORDER, REVERSE, EVEN,
    )

    if OVERLAP:
        wait_for_previous(CHUNKED)
        b_g = adjoint_at_end(
            p_gstate, p_dlast, o_chunk, i_b * channels + o_d, channels, m_d,
            N, CHUNKED, HAS_DLAST, EVEN,
        )
    b_dA = ()
    for _ in tl.static_range(N):
        b_dA = b_dA + (tl.zeros([BLOCK], tl.float32),)
    b_dD = tl.zeros([BLOCK], tl.float32)
    b_dbias = tl.zeros([BLOCK], tl.float32)
    # The scratch is read by other threads of this program than those that wrote it.
    tl.debug_barrier()

    s0 = first + (n_runs - 1) * K
    entry_k = entries_at(p_order, s0, length, K, ORDER, REVERSE)
    u_raw, delta_raw, dout_raw, z_raw = load_inputs(
        p_u, p_delta, p_dout, p_z, u_sl, delta_sl, dout_sl, z_sl, entry_k, s0, length, m_d,
        K, HAS_Z, ORDER, REVERSE, EVEN,
    )
    B_raw = load_run_states(p_B, B_sn, B_sl, entry_k, s0, length, K, SOME, PACK, ORDER, REVERSE)
    C_raw = load_run_states(p_C, C_sn, C_sl, entry_k, s0, length, K, SOME, PACK, ORDER, REVERSE)
    b_h = ()
    for n in tl.static_range(SOME):
        b_h = b_h + (tl.load(p_scratch + (s0 // K * N + n) * BLOCK),)
    ahead_k = entries_at(p_order, s0 - K, length, K, ORDER, REVERSE)
    for i in range(0, n_runs):
        s0 = first + (n_runs - 1 - i) * K
        s1 = s0 - K
        # The next run's inputs would take registers that many states need; so then they are loaded
        # behind the loop over the states. A few states leave too little time behind it.
        if N <= 2:
            further_k = entries_at(p_order, s1 - K, length, K, ORDER, REVERSE)
            u_next, delta_next, dout_next, z_next = load_inputs(
                p_u, p_delta, p_dout, p_z, u_sl, delta_sl, dout_sl, z_sl, ahead_k, s1, length, m_d,
                K, HAS_Z, ORDER, REVERSE, EVEN,
            )
        delta_k = steps_of_run(
            delta_raw, entry_k, b_bias, s0, length, K, HAS_BIAS, SOFTPLUS, ORDER
        )
        u_k = inputs_of_run(u_raw, entry_k, K, ORDER)
        dy_k = slopes_of_run(dout_raw, z_raw, entry_k, s0, length, K, HAS_Z, ORDER)
        x_k = ()
        dx_k = ()
        dd_k = ()
        y_k = ()
        for k in tl.static_range(K):
            x_k = x_k + (delta_k[k] * u_k[k],)
            dx_k = dx_k + (tl.zeros([BLOCK], tl.float32),)
            dd_k = dd_k + (tl.zeros([BLOCK], tl.float32),)
            y_k = y_k + (b_skip * u_k[k],)

        # A turn of the loop is for a few states, and the others wait in line. All of them at once
        # take longer to compile, and more registers.
        for n0 in range(0, N, SOME):
            # What follows are the next states of this run, or the first ones of the next run.
            same = n0 + SOME < N
            n1 = tl.where(same, n0 + SOME, 0)
            s2 = tl.where(same, s0, s1)
            follow_k = entry_k
            if ORDER:
                follow_k = ()
                for k in tl.static_range(K):
                    follow_k = follow_k + (tl.where(same, entry_k[k], ahead_k[k]),)
            B_next = load_run_states(
                p_B + n1 * B_sn, B_sn, B_sl, follow_k, s2, length, K, SOME, PACK, ORDER, REVERSE
            )
            C_next = load_run_states(
                p_C + n1 * C_sn, C_sn, C_sl, follow_k, s2, length, K, SOME, PACK, ORDER, REVERSE
            )
            p_noted = p_scratch + (tl.maximum(s2, first) // K * N + n1) * BLOCK
            p_sums = p_dbc + (s0 // K * N + n0) * 2 * K
            h_next = ()
            g_done = ()
            dA_done = ()
            for n in tl.static_range(SOME):
                B_k = ()
                C_k = ()
                for k in tl.static_range(K):
                    B_k = B_k + (state_of_late(B_raw[k], n, p_B.dtype.element_ty, PACK),)
                    C_k = C_k + (state_of_late(C_raw[k], n, p_C.dtype.element_ty, PACK),)
                b_gn, b_dAn, dx_k, dd_k, y_k, sums_k = gradients_of_state(
                    b_A[n], b_h[n], b_g[n], b_dA[n], B_k, C_k, delta_k, x_k, dy_k,
                    dx_k, dd_k, y_k, K, HAS_Z,
                )
                h_next = h_next + (tl.load(p_noted + n * BLOCK),)
                g_done = g_done + (b_gn,)
                dA_done = dA_done + (b_dAn,)
                tl.store(p_sums + n * 2 * K, sums_over_channels(sums_k, BLOCK))
            b_g = behind(b_g, g_done, N, SOME)
            b_dA = behind(b_dA, dA_done, N, SOME)
            b_A = behind(b_A, b_A, N, SOME)
            b_h = h_next
            B_raw = B_next
            C_raw = C_next

        if N > 2:
            further_k = entries_at(p_order, s1 - K, length, K, ORDER, REVERSE)
            u_next, delta_next, dout_next, z_next = load_inputs(
                p_u, p_delta, p_dout, p_z, u_sl, delta_sl, dout_sl, z_sl, ahead_k, s1, length, m_d,
                K, HAS_Z, ORDER, REVERSE, EVEN,
            )

        for k in tl.static_range(K):
            token, live = token_of(entry_k[k], s0 + k, length, ORDER, REVERSE)
            m_store = m_d & live & (s0 + k < length)
            b_du = dx_k[k] * delta_k[k] + b_skip * dy_k[k]
            b_ddelta = dd_k[k] * LN2 + dx_k[k] * u_k[k]
            if SOFTPLUS:
                b_ddelta = b_ddelta * slope_of_softplus(delta_k[k])
            if HAS_BIAS:
                b_dbias += tl.where(s0 + k < length, b_ddelta, 0.0)
            if HAS_D:
                b_dD += dy_k[k] * u_k[k]
            if HAS_Z:
                b_z = z_raw[k].to(tl.float32)
                b_sig = sigmoid(b_z)
                b_dz = dout_raw[k].to(tl.float32)
                b_dz = b_dz * y_k[k] * b_sig * (1.0 + b_z * (1.0 - b_sig))
                tl.store(p_dz + token * dz_sl, b_dz.to(p_dz.dtype.element_ty), mask=m_store)
            tl.store(p_du + token * du_sl, b_du.to(p_du.dtype.element_ty), mask=m_store)
            tl.store(
                p_ddelta + token * ddelta_sl, b_ddelta.to(p_ddelta.dtype.element_ty), mask=m_store
            )
        entry_k = ahead_k
        ahead_k = further_k
        u_raw = u_next
        delta_raw = delta_next
        dout_raw = dout_next
        z_raw = z_next

    for n in tl.static_range(N):
        tl.store(p_dchannel + n * channels, b_dA[n], mask=m_d)
    tl.store(p_dchannel + N * channels, b_dD, mask=m_d)
    tl.store(p_dchannel + (N + 1) * channels, b_dbias, mask=m_d)


@triton.jit
def sum_over_blocks(
    p_dbc, p_dB, p_dC, p_order, order_sg, i, groups, length, tokens, n_blocks, row,
    N: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr,
):
    """dB and dC (B, G, L, N): the sum of p_dbc over the blocks, moved from positions to tokens.

    Program i sums COLS of the L N values of one sequence and group. The rows of a token may be
    ``row`` apart, so that they are columns of a larger tensor.
    """
    cuts = tl.cdiv(length * N, COLS)
    i_bg = (i // cuts).to(tl.int64)
    o = (i % cuts).to(tl.int64) * COLS + tl.arange(0, COLS)
    position = o // N
    n = o % N
    mask = position < length
    runs = tl.cdiv(length, K).to(tl.int64)
    p_dbc += i_bg * n_blocks * runs * N * 2 * K
    p_dbc += (position // K * N + n) * 2 * K + position % K
    b_dC = tl.zeros([COLS], tl.float32)
    b_dB = tl.zeros([COLS], tl.float32)
    for _ in range(0, n_blocks):
        b_dC += tl.load(p_dbc, mask=mask, other=0.0)
        b_dB += tl.load(p_dbc + K, mask=mask, other=0.0)
        p_dbc += runs * N * 2 * K
    if REVERSE:
        position = length - 1 - position
    if ORDER:
        position = tl.load(p_order + i_bg % groups * order_sg + position, mask=mask, other=-1)
        mask = mask & (position >= 0)
    to = (i_bg * tokens + position) * row + n
    tl.store(p_dB + to, b_dB.to(p_dB.dtype.element_ty), mask=mask)
    tl.store(p_dC + to, b_dC.to(p_dC.dtype.element_ty), mask=mask)


@triton.jit
def sum_over_chunks(
    p_dchannel, p_dA, p_dD, p_dbias, i, channels, rows,
    N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """dA (D, N), dD and dbias (D,): the sum of p_dchannel (rows, N + 2, D) over its rows.

    Program i sums COLS channels of one of the N + 2.
    """
    cuts = tl.cdiv(channels, COLS)
    n = i // cuts
    o_d = i % cuts * COLS + tl.arange(0, COLS)
    mask = o_d < channels
    o_r = tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for r0 in range(0, rows, ROWS):
        r = r0 + o_r
        p = p_dchannel + (r[:, None] * (N + 2) + n) * channels + o_d[None, :]
        total += tl.load(p, mask=(r[:, None] < rows) & mask[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    tl.store(p_dA + o_d * N + n, total, mask=mask & (n < N))
    if HAS_D:
        tl.store(p_dD + o_d, total, mask=mask & (n == N))
    if HAS_BIAS:
        tl.store(p_dbias + o_d, total, mask=mask & (n == N + 1))


@triton.jit(
    do_not_specialize=['groups', 'length', 'tokens', 'n_blocks', 'order_sg', 'rows', 'over_blocks']
)
def sum_gradients_kernel(
    p_dbc, p_dB, p_dC, p_dchannel, p_dA, p_dD, p_dbias, p_order, order_sg,
    groups, length, tokens, n_blocks, row, channels, rows, over_blocks,
    N: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, ORDER: tl.constexpr, REVERSE: tl.constexpr, OVERLAP: tl.constexpr,
):
    """The second pass over what the chunks left: sums of fixed order, without atomics.

    The first ``over_blocks`` programs sum over the blocks of channels, the others over the chunks.
    """
    wait_for_previous(OVERLAP)
    i = tl.program_id(0)
    if i < over_blocks:
        sum_over_blocks(
            p_dbc, p_dB, p_dC, p_order, order_sg, i, groups, length, tokens, n_blocks, row,
            N, K, COLS, ORDER, REVERSE,
        )
    else:
        sum_over_chunks(
            p_dchannel, p_dA, p_dD, p_dbias, i - over_blocks,
            tl.cast(channels, tl.int64),  # a constant when there is one channel
            rows, N, 32, 32, HAS_D, HAS_BIAS,
        )
