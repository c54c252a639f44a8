"""Triton kernels of the selective scan: channels over lanes, states in registers, tokens in turn.

One program owns BLOCK channels of one group, one chunk of the sequence and one batch item. It
keeps the N states of its channels as a tuple of vectors, so that a step is N exponentials and
3 N multiply-adds per channel with neither shuffles nor shared memory.

Names: ``p_`` pointers, ``i_`` indices, ``b_`` blocks (vectors over channels), ``s`` places in the
order of visit. B batch, G groups, H channels per group, D = G H, L tokens, N state, NC chunks.
All arithmetic is float32; offsets that grow with a tensor's size are int64.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Numbers that follow the size of the image: a kernel is compiled once for all their values.
_SIZES = [
    'batch', 'groups', 'length', 'chunk', 'n_chunks', 'n_blocks', 'order_sg',
    'B_sb', 'B_sg', 'B_sl', 'C_sb', 'C_sg', 'C_sl',
]  # fmt: skip

# What one launch of the forward kernel is for.
SINGLE = tl.constexpr(0)  # the whole sequence from a zero state
AGGREGATE = tl.constexpr(1)  # the end state and the summed step of every chunk, from zero states
FINAL = tl.constexpr(2)  # every chunk again, from the state that the carry kernel left for it


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) with one exponential: log1p on [0, 1] is a polynomial of degree nine."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = -0.0032440233044326305
    p = p * e + 0.019851453602313995
    p = p * e - 0.05695951730012894
    p = p * e + 0.10603653639554977
    p = p * e - 0.15305592119693756
    p = p * e + 0.1967593878507614
    p = p * e - 0.24954134225845337
    p = p * e + 0.3332996368408203
    p = p * e - 0.4999990165233612
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _token(p_order, s, length, ORDER: tl.constexpr, REVERSE: tl.constexpr):
    """Index of the token visited at place s, and whether there is one (a table may say -1).

    Places behind the end repeat the last token, so that loads need no mask.
    """
    place = tl.minimum(s, length - 1)
    if REVERSE:
        place = length - 1 - place
    if ORDER:
        token = tl.load(p_order + place).to(tl.int64)
        live = token >= 0
        return tl.maximum(token, 0), live
    else:
        return place.to(tl.int64), place >= 0


@triton.jit
def _load(p, m_d, EVEN: tl.constexpr):
    """A block of channels as float32; the masked form costs a move per register."""
    if EVEN:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def _step(b_delta, b_bias, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    if HAS_BIAS:
        b_delta = b_delta + b_bias
    if SOFTPLUS:
        b_delta = _softplus(b_delta)
    return b_delta


@triton.jit(do_not_specialize=_SIZES)
def scan_forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_order, p_out, p_last, p_state, p_sum,
    u_sb, u_sg, u_sd, u_sl, delta_sb, delta_sg, delta_sd, delta_sl,
    B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, out_sb, out_sg, out_sd, out_sl, order_sg,
    heads, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MODE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = sum_n C_t h_t + D u_t, out = y silu(z).

    p_state (B, NC, N, D) and p_sum (B, NC, D) are float32: AGGREGATE writes the end states of the
    chunks and their summed steps, FINAL reads the states before the chunks. p_last is (B, D, N).
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    i_g = (pid // n_blocks) % groups
    i_c = (pid // (n_blocks * groups)) % n_chunks
    i_b = pid // (n_blocks * groups * n_chunks)

    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h < heads
    o_d = i_g * heads + o_h
    p_u += i_b * u_sb + i_g * u_sg + o_h * u_sd
    p_delta += i_b * delta_sb + i_g * delta_sg + o_h * delta_sd
    p_B += i_b * B_sb + i_g * B_sg
    p_C += i_b * C_sb + i_g * C_sg
    p_out += i_b * out_sb + i_g * out_sg + o_h * out_sd
    if HAS_Z:
        p_z += i_b * z_sb + i_g * z_sg + o_h * z_sd
    if ORDER:
        p_order += i_g * order_sg
    channels = groups.to(tl.int64) * heads
    p_state += (i_b * n_chunks + i_c) * N * channels + o_d
    p_A += o_d * N

    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = _load(p_bias + o_d, m_d, EVEN)
    b_skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        b_skip = _load(p_D + o_d, m_d, EVEN)
    b_A = ()
    b_h = ()
    for n in tl.static_range(N):
        b_A = b_A + (_load(p_A + n, m_d, EVEN) * LOG2E,)
        if MODE == FINAL:
            b_h = b_h + (_load(p_state + n * channels, m_d, EVEN),)
        else:
            b_h = b_h + (tl.zeros([BLOCK], tl.float32),)
    b_sum = tl.zeros([BLOCK], tl.float32)

    first = i_c.to(tl.int32) * chunk
    for s0 in range(first, tl.minimum(first + chunk, length), UNROLL):
        # All loads of a group of tokens come before its stores: nothing tells the compiler that
        # the output overlaps no input, so it moves no load over a store.
        u_k = ()
        delta_k = ()
        z_k = ()
        token_k = ()
        store_k = ()
        for k in tl.static_range(UNROLL):
            token, live = _token(p_order, s0 + k, length, ORDER, REVERSE)
            b_u = _load(p_u + token * u_sl, m_d, EVEN)
            b_delta = _load(p_delta + token * delta_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
                b_delta = tl.where(live, b_delta, 0.0)
            if HAS_Z and MODE != AGGREGATE:
                z_k = z_k + (_load(p_z + token * z_sl, m_d, EVEN),)
            u_k = u_k + (b_u,)
            delta_k = delta_k + (b_delta,)
            token_k = token_k + (token,)
            store_k = store_k + (live & (s0 + k < length),)
        y_k = ()
        for k in tl.static_range(UNROLL):
            # A step of zero leaves the state alone: that is all a ragged end needs.
            b_delta = _step(delta_k[k], b_bias, HAS_BIAS, SOFTPLUS)
            b_delta = tl.where(s0 + k < length, b_delta, 0.0)
            b_x = b_delta * u_k[k]
            b_y = b_skip * u_k[k]
            b_next = ()
            for n in tl.static_range(N):
                b_B = tl.load(p_B + n * B_sn + token_k[k] * B_sl).to(tl.float32)
                b_state = tl.exp2(b_A[n] * b_delta) * b_h[n] + b_x * b_B
                b_next = b_next + (b_state,)
                if MODE != AGGREGATE:
                    b_C = tl.load(p_C + n * C_sn + token_k[k] * C_sl).to(tl.float32)
                    b_y += b_state * b_C
            b_h = b_next
            if MODE == AGGREGATE:
                b_sum += b_delta
            else:
                if HAS_Z:
                    b_y = b_y * z_k[k] * _sigmoid(z_k[k])
                y_k = y_k + (b_y,)
        if MODE != AGGREGATE:
            for k in tl.static_range(UNROLL):
                tl.store(
                    p_out + token_k[k] * out_sl,
                    y_k[k].to(p_out.dtype.element_ty),
                    mask=m_d & store_k[k],
                )

    if MODE == AGGREGATE:
        for n in tl.static_range(N):
            tl.store(p_state + n * channels, b_h[n], mask=m_d)
        tl.store(p_sum + (i_b * n_chunks + i_c) * channels + o_d, b_sum, mask=m_d)
    else:
        p_last += (i_b * channels + o_d) * N
        for n in tl.static_range(N):
            tl.store(p_last + n, b_h[n], mask=m_d & (i_c == n_chunks - 1))


@triton.jit(do_not_specialize=['n_chunks'])
def scan_carry_kernel(
    p_state, p_sum, p_A, p_first,
    channels, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    HAS_FIRST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds to the state by the state that enters it, in place.

    p_state (B, NC, N, D); the decay of a chunk is exp(A p_sum), p_sum (B, NC, D). BACKWARD runs
    from the last chunk to the first, for the gradient of the state, from p_first (B, D, N).
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    n = (pid // n_blocks) % N
    i_b = pid // (n_blocks * N)
    channels = tl.cast(channels, tl.int64)  # a constant when there is one channel
    o_d = i_block * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < channels
    b_A = tl.load(p_A + o_d * N + n, mask=m_d, other=0.0) * LOG2E
    b_h = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        b_h = tl.load(p_first + (i_b * channels + o_d) * N + n, mask=m_d, other=0.0)
    p_sum += i_b * n_chunks * channels + o_d
    p_state += (i_b * n_chunks * N + n) * channels + o_d
    for c0 in range(0, n_chunks, UNROLL):
        # The loads of several chunks are in flight together; only the multiply-adds are in turn.
        add_k = ()
        sum_k = ()
        for k in tl.static_range(UNROLL):
            c = tl.minimum(c0 + k, n_chunks - 1)
            if BACKWARD:
                c = n_chunks - 1 - c
            sum_k = sum_k + (tl.load(p_sum + c * channels, mask=m_d, other=0.0),)
            add_k = add_k + (tl.load(p_state + c * N * channels, mask=m_d, other=0.0),)
        for k in tl.static_range(UNROLL):
            c = tl.minimum(c0 + k, n_chunks - 1)
            m_c = c0 + k < n_chunks
            if BACKWARD:
                c = n_chunks - 1 - c
            tl.store(p_state + c * N * channels, b_h, mask=m_d & m_c)
            b_h = tl.exp2(b_A * sum_k[k]) * b_h + add_k[k]


@triton.jit(do_not_specialize=_SIZES)
def scan_backward_aggregate_kernel(
    p_delta, p_A, p_C, p_z, p_bias, p_order, p_dout, p_state, p_sum,
    delta_sb, delta_sg, delta_sd, delta_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, dout_sb, dout_sg, dout_sd, dout_sl, order_sg,
    heads, groups, length, chunk, n_chunks, n_blocks,
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
    m_d = o_h < heads
    o_d = i_g * heads + o_h
    p_delta += i_b * delta_sb + i_g * delta_sg + o_h * delta_sd
    p_C += i_b * C_sb + i_g * C_sg
    p_dout += i_b * dout_sb + i_g * dout_sg + o_h * dout_sd
    if HAS_Z:
        p_z += i_b * z_sb + i_g * z_sg + o_h * z_sd
    if ORDER:
        p_order += i_g * order_sg
    channels = groups.to(tl.int64) * heads
    p_A += o_d * N

    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = _load(p_bias + o_d, m_d, EVEN)
    b_A = ()
    b_g = ()
    for n in tl.static_range(N):
        b_A = b_A + (_load(p_A + n, m_d, EVEN) * LOG2E,)
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
            token, live = _token(p_order, s, length, ORDER, REVERSE)
            b_delta = _load(p_delta + token * delta_sl, m_d, EVEN)
            if ORDER:
                b_delta = tl.where(live, b_delta, 0.0)
            b_dy = _load(p_dout + token * dout_sl, m_d, EVEN)
            if HAS_Z:
                b_z = _load(p_z + token * z_sl, m_d, EVEN)
                b_dy = b_dy * b_z * _sigmoid(b_z)
            delta_k = delta_k + (b_delta,)
            dy_k = dy_k + (tl.where(live & (s < length), b_dy, 0.0),)
            token_k = token_k + (token,)
        for j in tl.static_range(UNROLL):
            b_delta = _step(delta_k[j], b_bias, HAS_BIAS, SOFTPLUS)
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


@triton.jit(do_not_specialize=_SIZES)
def scan_backward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_order, p_dout,
    p_state, p_gstate, p_dlast, p_scratch, p_du, p_ddelta, p_dz, p_dbc, p_dchannel,
    u_sb, u_sg, u_sd, u_sl, delta_sb, delta_sg, delta_sd, delta_sl,
    B_sb, B_sg, B_sn, B_sl, C_sb, C_sg, C_sn, C_sl,
    z_sb, z_sg, z_sd, z_sl, dout_sb, dout_sg, dout_sd, dout_sl,
    du_sb, du_sg, du_sd, du_sl, ddelta_sb, ddelta_sg, ddelta_sd, ddelta_sl,
    dz_sb, dz_sg, dz_sd, dz_sl, order_sg,
    batch, heads, groups, length, chunk, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, CHUNKED: tl.constexpr,
    HAS_DLAST: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, ORDER: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk.

    A first sweep stores the state at every K-th token in p_scratch (B, ceil(L / K), N, D); the
    second goes back over the runs of K tokens and rebuilds their states in registers. The sums
    over channels go to p_dbc (2, blocks, B, G, places, N), with a place for every token of every
    run, and the sums over tokens to p_dchannel (B, NC, N + 2, D) (A, then D, then the bias). A
    second pass adds them up in a fixed order: no atomics, so every run gives the same bits.
    p_gstate (B, NC, N, D) holds the gradient of the state that leaves each chunk.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    i_g = (pid // n_blocks) % groups
    i_c = (pid // (n_blocks * groups)) % n_chunks
    i_b = pid // (n_blocks * groups * n_chunks)

    o_h = i_block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_h < heads
    o_d = i_g * heads + o_h
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
    channels = groups.to(tl.int64) * heads
    p_A += o_d * N
    p_scratch += i_b * tl.cdiv(length, K) * N * channels + o_d
    places = tl.cdiv(length, K) * K
    p_dB = p_dbc + ((i_block * batch + i_b) * groups + i_g) * places * N
    p_dC = p_dB + n_blocks.to(tl.int64) * batch * groups * places * N

    b_bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b_bias = _load(p_bias + o_d, m_d, EVEN)
    b_skip = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        b_skip = _load(p_D + o_d, m_d, EVEN)
    o_chunk = (i_b * n_chunks + i_c) * N * channels + o_d
    p_gstate += o_chunk
    p_dchannel += (i_b * n_chunks + i_c) * (N + 2) * channels + o_d
    b_A = ()
    b_h = ()
    for n in tl.static_range(N):
        b_A = b_A + (_load(p_A + n, m_d, EVEN) * LOG2E,)
        if CHUNKED:
            b_h = b_h + (_load(p_state + o_chunk + n * channels, m_d, EVEN),)
        else:
            b_h = b_h + (tl.zeros([BLOCK], tl.float32),)
            b_g = tl.zeros([BLOCK], tl.float32)
            if HAS_DLAST:
                b_g = _load(p_dlast + (i_b * channels + o_d) * N + n, m_d, EVEN)
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
            token, live = _token(p_order, s0 + k, length, ORDER, REVERSE)
            b_u = _load(p_u + token * u_sl, m_d, EVEN)
            b_delta = _load(p_delta + token * delta_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
                b_delta = tl.where(live, b_delta, 0.0)
            b_delta = _step(b_delta, b_bias, HAS_BIAS, SOFTPLUS)
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
            token, live = _token(p_order, s0 + k, length, ORDER, REVERSE)
            b_u = _load(p_u + token * u_sl, m_d, EVEN)
            b_delta = _load(p_delta + token * delta_sl, m_d, EVEN)
            b_dy = _load(p_dout + token * dout_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
                b_delta = tl.where(live, b_delta, 0.0)
            b_dy = tl.where(live & (s0 + k < length), b_dy, 0.0)
            if HAS_Z:
                b_z = _load(p_z + token * z_sl, m_d, EVEN)
                b_dy = b_dy * b_z * _sigmoid(b_z)
                y_k = y_k + (b_skip * b_u,)
            b_delta = _step(b_delta, b_bias, HAS_BIAS, SOFTPLUS)
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
            b_rate = _load(p_A + i_n, m_d, EVEN)
            b_An = b_rate * LOG2E
            b_state = _load(p_scratch + (s0 // K * N + i_n) * channels, m_d, EVEN)
            b_g = _load(p_gstate + i_n * channels, m_d, EVEN)
            b_dA = _load(p_dchannel + i_n * channels, m_d, EVEN)
            B_k = ()
            C_k = ()
            for k in tl.static_range(K):
                token, live = _token(p_order, s0 + k, length, ORDER, REVERSE)
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
            token, live = _token(p_order, s0 + k, length, ORDER, REVERSE)
            m_store = m_d & live & (s0 + k < length)
            b_du = dx_k[k] * delta_k[k] + b_skip * dy_k[k]
            b_u = _load(p_u + token * u_sl, m_d, EVEN)
            if ORDER:
                b_u = tl.where(live, b_u, 0.0)
            b_ddelta = dd_k[k] + dx_k[k] * b_u
            if SOFTPLUS:
                b_raw = _load(p_delta + token * delta_sl, m_d, EVEN)
                if ORDER:
                    b_raw = tl.where(live, b_raw, 0.0)
                b_ddelta = b_ddelta * _sigmoid(b_raw + b_bias)
            if HAS_BIAS:
                b_dbias += tl.where(s0 + k < length, b_ddelta, 0.0)
            if HAS_Z:
                b_z = _load(p_z + token * z_sl, m_d, EVEN)
                b_sig = _sigmoid(b_z)
                b_dz = _load(p_dout + token * dout_sl, m_d, EVEN)
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
    """dB and dC (B, G, L, N): the sum of p_dbc over the blocks, moved from places to tokens.

    The rows of a token may be ``row`` apart, so that they are columns of a larger tensor.
    """
    which = tl.program_id(1)
    places = tl.cdiv(length, K) * K
    cuts = tl.cdiv(length * N, COLS)
    i_bg = (tl.program_id(0) // cuts).to(tl.int64)
    o = (tl.program_id(0) % cuts).to(tl.int64) * COLS + tl.arange(0, COLS)
    place = o // N
    mask = place < length
    size = places.to(tl.int64) * N
    p_dbc += (which * n_blocks * batch * groups + i_bg) * size + o
    total = tl.zeros([COLS], tl.float32)
    for _ in range(0, n_blocks):
        total += tl.load(p_dbc, mask=mask, other=0.0)
        p_dbc += batch * groups * size
    if REVERSE:
        place = length - 1 - place
    if ORDER:
        place = tl.load(p_order + i_bg % groups * order_sg + place, mask=mask, other=-1)
        mask = mask & (place >= 0)
    to = (i_bg * tokens + place) * row + o % N
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
