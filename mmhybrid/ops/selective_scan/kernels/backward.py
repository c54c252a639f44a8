"""The backward kernels: the forward sweep mirrored, all gradients of a chunk, and their sums."""

import triton
import triton.language as tl

from .common import LOG2E, SIZES, load_channels, sigmoid, step_size, token_at


@triton.jit(do_not_specialize=SIZES)
def scan_backward_aggregate_kernel(
    p_delta, p_A, p_C, p_z, p_bias, p_order, p_dout, p_state, p_sum,
    delta_sb, delta_sg, delta_sd, delta_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, dout_sb, dout_sg, dout_sd, dout_sl, order_sg,
    group_dim, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the gradient of the state before it, and its summed step.

    The mirror of the forward AGGREGATE: g_t = exp(dt_t A) (g_{t+1} + dy_t C_t), from the right.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    i_g = (pid // n_blocks) % groups
    i_c = (pid // (n_blocks * groups)) % n_chunks
    i_b = pid // (n_blocks * groups * n_chunks)

    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h < group_dim
    o_d = i_g * group_dim + o_h
    p_delta += i_b * delta_sb + i_g * delta_sg + o_h * delta_sd
    p_C += i_b * C_sb + i_g * C_sg
    p_dout += i_b * dout_sb + i_g * dout_sg + o_h * dout_sd
    if HAS_Z:
        p_z += i_b * z_sb + i_g * z_sg + o_h * z_sd
    if ORDER:
        p_order += i_g * order_sg
    channels = groups.to(tl.int64) * group_dim
    p_A += o_d * N

    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = load_channels(p_bias + o_d, m_d, EVEN)
    b_A = ()
    b_g = ()
    for n in tl.static_range(N):
        b_A = b_A + (load_channels(p_A + n, m_d, EVEN) * LOG2E,)
        b_g = b_g + (tl.zeros([BLOCK], tl.float32),)
    b_sum = tl.zeros([BLOCK], tl.float32)

    first = i_c.to(tl.int32) * chunk
    n_subs = tl.cdiv(tl.minimum(chunk, length - first), UNROLL)
    for i in range(0, n_subs):
        s0 = first + (n_subs - 1 - i) * UNROLL
        delta_k = ()
        dy_k = ()
        token_k = ()
        for j in tl.static_range(UNROLL):
            s = s0 + UNROLL - 1 - j
            token, live = token_at(p_order, s, length, ORDER, REVERSE)
            b_delta = load_channels(p_delta + token * delta_sl, m_d, EVEN)
            if ORDER:
                b_delta = tl.where(live, b_delta, 0.0)
            b_dy = load_channels(p_dout + token * dout_sl, m_d, EVEN)
            if HAS_Z:
                b_z = load_channels(p_z + token * z_sl, m_d, EVEN)
                b_dy = b_dy * b_z * sigmoid(b_z)
            delta_k = delta_k + (b_delta,)
            dy_k = dy_k + (tl.where(live & (s < length), b_dy, 0.0),)
            token_k = token_k + (token,)
        for j in tl.static_range(UNROLL):
            b_delta = step_size(delta_k[j], b_bias, HAS_BIAS, SOFTPLUS)
            b_delta = tl.where(s0 + UNROLL - 1 - j < length, b_delta, 0.0)
            b_next = ()
            for n in tl.static_range(N):
                b_C = tl.load(p_C + n * C_sn + token_k[j] * C_sl).to(tl.float32)
                b_next = b_next + (tl.exp2(b_A[n] * b_delta) * (b_g[n] + dy_k[j] * b_C),)
            b_g = b_next
            b_sum += b_delta

    p_state += (i_b * n_chunks + i_c) * N * channels + o_d
    for n in tl.static_range(N):
        tl.store(p_state + n * channels, b_g[n], mask=m_d)
    tl.store(p_sum + (i_b * n_chunks + i_c) * channels + o_d, b_sum, mask=m_d)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_order, p_dout,
    p_state, p_gstate, p_dlast, p_scratch, p_du, p_ddelta, p_dz, p_dbc, p_dchannel,
    u_sb, u_sg, u_sd, u_sl, delta_sb, delta_sg, delta_sd, delta_sl,
    B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, dout_sb, dout_sg, dout_sd, dout_sl,
    du_sb, du_sg, du_sd, du_sl, ddelta_sb, ddelta_sg, ddelta_sd, ddelta_sl,
    dz_sb, dz_sg, dz_sd, dz_sl, order_sg,
    batch, group_dim, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, CHUNKED: tl.constexpr,
    HAS_DLAST: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk.

    A first sweep stores the state at every K-th token in p_scratch (B, ceil(L / K), N, D); the
    second goes back over the runs of K tokens and rebuilds their states in registers. The sums
    over channels go to p_dbc (2, blocks, B, G, positions, N), with a position for every token of
    every run, and the sums over tokens to p_dchannel (B, NC, N + 2, D) (A, then D, then the bias).
    A second pass adds them up in a fixed order: no atomics, so every run gives the same bits.
    p_gstate (B, NC, N, D) holds the gradient of the state that leaves each chunk.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    i_g = (pid // n_blocks) % groups
    i_c = (pid // (n_blocks * groups)) % n_chunks
    i_b = pid // (n_blocks * groups * n_chunks)

    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h < group_dim
    o_d = i_g * group_dim + o_h
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
    channels = groups.to(tl.int64) * group_dim
    p_A += o_d * N
    p_scratch += i_b * tl.cdiv(length, K) * N * channels + o_d
    positions = tl.cdiv(length, K) * K
    p_dB = p_dbc + ((i_block * batch + i_b) * groups + i_g) * positions * N
    p_dC = p_dB + n_blocks.to(tl.int64) * batch * groups * positions * N

    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = load_channels(p_bias + o_d, m_d, EVEN)
    b_skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        b_skip = load_channels(p_D + o_d, m_d, EVEN)
    o_chunk = (i_b * n_chunks + i_c) * N * channels + o_d
    p_gstate += o_chunk
    p_dchannel += (i_b * n_chunks + i_c) * (N + 2) * channels + o_d
    b_A = ()
    b_h = ()
    for n in tl.static_range(N):
        b_A = b_A + (load_channels(p_A + n, m_d, EVEN) * LOG2E,)
        if CHUNKED:
            b_h = b_h + (load_channels(p_state + o_chunk + n * channels, m_d, EVEN),)
        else:
            b_h = b_h + (tl.zeros([BLOCK], tl.float32),)
            b_g = tl.zeros([BLOCK], tl.float32)
            if HAS_DLAST:
                b_g = load_channels(p_dlast + (i_b * channels + o_d) * N + n, m_d, EVEN)
            tl.store(p_gstate + n * channels, b_g, mask=m_d)
        tl.store(p_dchannel + n * channels, tl.zeros([BLOCK], tl.float32), mask=m_d)
    b_dD = tl.zeros([BLOCK], tl.float32)
    b_dbias = tl.zeros([BLOCK], tl.float32)

    first = i_c.to(tl.int32) * chunk
    n_subs = tl.cdiv(tl.minimum(chunk, length - first), K)

    for n in tl.static_range(N):
        tl.store(p_scratch + (first // K * N + n) * channels, b_h[n], mask=m_d)
    for i in range(0, n_subs - 1):
        s0 = first + i * K
        for k in tl.static_range(K):
            token, live = token_at(p_order, s0 + k, length, ORDER, REVERSE)
            b_u = load_channels(p_u + token * u_sl, m_d, EVEN)
            b_delta = load_channels(p_delta + token * delta_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
                b_delta = tl.where(live, b_delta, 0.0)
            b_delta = step_size(b_delta, b_bias, HAS_BIAS, SOFTPLUS)
            b_x = b_delta * b_u
            b_next = ()
            for n in tl.static_range(N):
                b_B = tl.load(p_B + n * B_sn + token * B_sl).to(tl.float32)
                b_next = b_next + (tl.exp2(b_A[n] * b_delta) * b_h[n] + b_x * b_B,)
            b_h = b_next
        for n in tl.static_range(N):
            tl.store(p_scratch + ((s0 // K + 1) * N + n) * channels, b_h[n], mask=m_d)
    # The scratch is read by other threads of this program than those that wrote it.
    tl.debug_barrier()

    for i in range(0, n_subs):
        s0 = first + (n_subs - 1 - i) * K
        delta_k = ()
        x_k = ()
        dy_k = ()
        dx_k = ()
        dd_k = ()
        y_k = ()
        for k in tl.static_range(K):
            token, live = token_at(p_order, s0 + k, length, ORDER, REVERSE)
            b_u = load_channels(p_u + token * u_sl, m_d, EVEN)
            b_delta = load_channels(p_delta + token * delta_sl, m_d, EVEN)
            b_dy = load_channels(p_dout + token * dout_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
                b_delta = tl.where(live, b_delta, 0.0)
            b_dy = tl.where(live & (s0 + k < length), b_dy, 0.0)
            if HAS_Z:
                b_z = load_channels(p_z + token * z_sl, m_d, EVEN)
                b_dy = b_dy * b_z * sigmoid(b_z)
                y_k = y_k + (b_skip * b_u,)
            b_delta = step_size(b_delta, b_bias, HAS_BIAS, SOFTPLUS)
            b_delta = tl.where(s0 + k < length, b_delta, 0.0)
            if HAS_D:
                b_dD += b_dy * b_u
            delta_k = delta_k + (b_delta,)
            x_k = x_k + (b_delta * b_u,)
            dy_k = dy_k + (b_dy,)
            dx_k = dx_k + (tl.zeros([BLOCK], tl.float32),)
            dd_k = dd_k + (tl.zeros([BLOCK], tl.float32),)

        # A loop that is not unrolled: the code stays small for any N, and what belongs to one state
        # (its value before the run, its gradient, dA) waits in memory, touched once per K tokens.
        for i_n in range(0, N):
            b_rate = load_channels(p_A + i_n, m_d, EVEN)
            b_An = b_rate * LOG2E
            b_state = load_channels(p_scratch + (s0 // K * N + i_n) * channels, m_d, EVEN)
            b_g = load_channels(p_gstate + i_n * channels, m_d, EVEN)
            b_dA = load_channels(p_dchannel + i_n * channels, m_d, EVEN)
            B_k = ()
            C_k = ()
            for k in tl.static_range(K):
                token, live = token_at(p_order, s0 + k, length, ORDER, REVERSE)
                B_k = B_k + (tl.load(p_B + i_n * B_sn + token * B_sl).to(tl.float32),)
                C_k = C_k + (tl.load(p_C + i_n * C_sn + token * C_sl).to(tl.float32),)
            decay_k = ()
            before_k = ()
            ynew_k = ()
            for k in tl.static_range(K):
                b_decay = tl.exp2(b_An * delta_k[k])
                b_state = b_decay * b_state
                before_k = before_k + (b_state,)
                b_state += x_k[k] * B_k[k]
                decay_k = decay_k + (b_decay,)
                tl.store(p_dC + (s0 + k) * N + i_n, tl.sum(dy_k[k] * b_state, axis=0))
                if HAS_Z:
                    ynew_k = ynew_k + (y_k[k] + C_k[k] * b_state,)
            if HAS_Z:
                y_k = ynew_k
            dxnew_k = ()
            ddnew_k = ()
            for j in tl.static_range(K):
                b_g += dy_k[K - 1 - j] * C_k[K - 1 - j]
                o_dB = (s0 + K - 1 - j) * N + i_n
                tl.store(p_dB + o_dB, tl.sum(b_g * x_k[K - 1 - j], axis=0))
                b_q = b_g * before_k[K - 1 - j]
                b_dA += b_q * delta_k[K - 1 - j]
                dxnew_k = (dx_k[K - 1 - j] + b_g * B_k[K - 1 - j],) + dxnew_k
                ddnew_k = (dd_k[K - 1 - j] + b_q * b_rate,) + ddnew_k
                b_g = b_g * decay_k[K - 1 - j]
            dx_k = dxnew_k
            dd_k = ddnew_k
            tl.store(p_gstate + i_n * channels, b_g, mask=m_d)
            tl.store(p_dchannel + i_n * channels, b_dA, mask=m_d)
        tl.debug_barrier()

        # What the loop over states did not need is read again rather than kept in registers.
        for k in tl.static_range(K):
            token, live = token_at(p_order, s0 + k, length, ORDER, REVERSE)
            m_store = m_d & live & (s0 + k < length)
            b_du = dx_k[k] * delta_k[k] + b_skip * dy_k[k]
            b_u = load_channels(p_u + token * u_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
            b_ddelta = dd_k[k] + dx_k[k] * b_u
            if SOFTPLUS:
                b_raw = load_channels(p_delta + token * delta_sl, m_d, EVEN)
                if ORDER:
                    b_raw = tl.where(live, b_raw, 0.0)
                b_ddelta = b_ddelta * sigmoid(b_raw + b_bias)
            if HAS_BIAS:
                b_dbias += tl.where(s0 + k < length, b_ddelta, 0.0)
            if HAS_Z:
                b_z = load_channels(p_z + token * z_sl, m_d, EVEN)
                b_sig = sigmoid(b_z)
                b_dz = load_channels(p_dout + token * dout_sl, m_d, EVEN)
                b_dz = b_dz * y_k[k] * b_sig * (1.0 + b_z * (1.0 - b_sig))
                tl.store(p_dz + token * dz_sl, b_dz.to(p_dz.dtype.element_ty), mask=m_store)
            tl.store(p_du + token * du_sl, b_du.to(p_du.dtype.element_ty), mask=m_store)
            tl.store(
                p_ddelta + token * ddelta_sl, b_ddelta.to(p_ddelta.dtype.element_ty), mask=m_store
            )

    tl.store(p_dchannel + N * channels, b_dD, mask=m_d)
    tl.store(p_dchannel + (N + 1) * channels, b_dbias, mask=m_d)


@triton.jit(do_not_specialize=['batch', 'groups', 'length', 'tokens', 'n_blocks', 'order_sg'])
def sum_over_blocks_kernel(
    p_dbc, p_dB, p_dC, p_order, order_sg, batch, groups, length, tokens, n_blocks, row,
    N: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dB and dC (B, G, L, N): the sum of p_dbc over the blocks, moved from positions to tokens.

    The rows of a token may be ``row`` apart, so that they are columns of a larger tensor.
    """
    which = tl.program_id(1)
    positions = tl.cdiv(length, K) * K
    cuts = tl.cdiv(length * N, COLS)
    i_bg = (tl.program_id(0) // cuts).to(tl.int64)
    o = (tl.program_id(0) % cuts).to(tl.int64) * COLS + tl.arange(0, COLS)
    position = o // N
    mask = position < length
    size = positions.to(tl.int64) * N
    p_dbc += (which * n_blocks * batch * groups + i_bg) * size + o
    total = tl.zeros([COLS], tl.float32)
    for _ in range(0, n_blocks):
        total += tl.load(p_dbc, mask=mask, other=0.0)
        p_dbc += batch * groups * size
    if REVERSE:
        position = length - 1 - position
    if ORDER:
        position = tl.load(p_order + i_bg % groups * order_sg + position, mask=mask, other=-1)
        mask = mask & (position >= 0)
    to = (i_bg * tokens + position) * row + o % N
    if which == 0:
        tl.store(p_dB + to, total.to(p_dB.dtype.element_ty), mask=mask)
    else:
        tl.store(p_dC + to, total.to(p_dC.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows'])
def sum_over_chunks_kernel(
    p_dchannel, p_dA, p_dD, p_dbias, channels, rows, state,
    ROWS: tl.constexpr, COLS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dA (D, N), dD and dbias (D,): the sum of p_dchannel (rows, N + 2, D) over its rows."""
    n = tl.program_id(1)
    channels = tl.cast(channels, tl.int64)  # a constant when there is one channel
    o_d = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = o_d < channels
    o_r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for r0 in range(0, rows, ROWS):
        r = r0 + o_r
        p = p_dchannel + (r[:, None] * (state + 2) + n) * channels + o_d[None, :]
        total += tl.load(p, mask=(r[:, None] < rows) & mask[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    tl.store(p_dA + o_d * state + n, total, mask=mask & (n < state))
    if HAS_D:
        tl.store(p_dD + o_d, total, mask=mask & (n == state))
    if HAS_BIAS:
        tl.store(p_dbias + o_d, total, mask=mask & (n == state + 1))
