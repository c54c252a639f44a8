"""What the kernels of both passes share: layout of arguments, arithmetic of a step, the carry."""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton, for which no plan lets launches overlap
    gdc_launch_dependents = gdc_wait = None

LOG2E = tl.constexpr(1.4426950408889634)

# What a table of tokens holds, if there is one: each token once, or holes (-1) among them, too.
PERMUTED = tl.constexpr(1)
HOLES = tl.constexpr(2)

# Numbers that follow the size of the image: a kernel is compiled once for all their values.
SIZES = [
    'batch', 'groups', 'length', 'chunk', 'n_chunks', 'n_blocks', 'order_sg',
    'B_sb', 'B_sg', 'B_sl', 'C_sb', 'C_sg', 'C_sl',
]


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with one exponential: log1p on [0, 1] is a polynomial of degree eight.

    What it is off by, 3.3e-8 of the value, is less than the rounding of its own sums.
    """
    e = tl.exp2(tl.abs(x) * -LOG2E)  # a minus in front would be an instruction, 0 - |x|
    p = 0.005364824552088976
    p = p * e - 0.03006579354405403
    p = p * e + 0.07920453697443008
    p = p * e - 0.13753803074359894
    p = p * e + 0.191536545753479
    p = p * e - 0.24857163429260254
    p = p * e + 0.3332132399082184
    p = p * e - 0.49999648332595825
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def token_step(stride, WIDE: tl.constexpr):
    """A stride over tokens, by which the index of a token is multiplied in 32 or 64 bits.

    Of the 86 instructions that a token of eight states cost a sweep in 64 bits, ten were for
    addresses that 32 bits can hold; ``passes.is_wide`` says when they cannot.
    """
    if WIDE:
        return tl.cast(stride, tl.int64)
    else:
        return stride


@triton.jit
def position_at(s, end, length, REVERSE: tl.constexpr):
    """Index of what is visited at position s; from ``end`` on that of the last before it."""
    position = tl.minimum(s, end - 1)
    if REVERSE:
        position = length - 1 - position
    return position


@triton.jit
def load_as_is(p, m_d, EVEN: tl.constexpr):
    """A block of channels in its own dtype; the masked form costs a move per register."""
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=m_d, other=0.0)


@triton.jit
def load_channels(p, m_d, EVEN: tl.constexpr):
    """A block of channels as float32."""
    return load_as_is(p, m_d, EVEN).to(tl.float32)


@triton.jit
def load_states(p, step, N: tl.constexpr, PACK: tl.constexpr):
    """The N values of B or C for one token, from p on and ``step`` apart, as they lie in memory.

    What comes back is for :func:`state_of`, and may be carried through a loop. With PACK it is
    N / 4 words of 64 bits: the values have 16 bits and are neighbours, N is a multiple of 4 and p
    of 8 bytes, which ``passes.packs`` has checked. Else it is the N values in their own dtype.
    """
    words = ()
    if PACK:
        p = p.to(tl.pointer_type(tl.int64), bitcast=True)
        for w in tl.static_range(N // 4):
            words = words + (tl.load(p + w),)
    else:
        for n in tl.static_range(N):
            words = words + (tl.load(p + n * step),)
    return words


@triton.jit
def state_of(words, n: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """Value n of what :func:`load_states` returned for a pointer to DTYPE, as float32."""
    if PACK:
        half = (words[n // 4] >> (n % 4 // 2 * 32)).to(tl.int32)
        if DTYPE == tl.bfloat16:  # the upper half of a float32
            bits = half & -65536 if n % 2 else half << 16
            return bits.to(tl.float32, bitcast=True)
        else:
            bits = (half >> (n % 2 * 16)).to(tl.int16)
            return bits.to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return words[n].to(tl.float32)


@triton.jit
def state_of_late(words, n: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """:func:`state_of` for the backward sweeps.

    It is a few instructions more, which the compiler leaves where the value is used. Those of
    ``state_of`` it pulls up to the load, and then waits for it there.
    """
    if PACK:
        bits = (words[n // 4] >> (n % 4 * 16)).to(tl.int16)
        return bits.to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return words[n].to(tl.float32)


@triton.jit
def step_size(b_delta, b_bias, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The step of a token from what was given for it: plus the bias, through softplus."""
    if HAS_BIAS:
        b_delta = b_delta + b_bias
    if SOFTPLUS:
        b_delta = softplus(b_delta)
    return b_delta


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Let programs of the next launch of a call begin where programs of this one have ended."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until all programs of the launch before have ended and what they wrote can be read.

    Whatever a launch before the last one wrote can be read from here on, too, as every launch but
    the first waits; and what the first one reads is there at once.
    """
    if OVERLAP:
        gdc_wait()


@triton.jit
def one_after_the_other(decay_a, b_a, decay_b, b_b):
    """Two stretches of tokens as one: a state h leaves the first as decay_a h + b_a."""
    return decay_a * decay_b, decay_b * b_a + b_b


@triton.jit(do_not_specialize=['n_chunks'])
def scan_carry_kernel(
    p_state, p_sum, p_A, p_first,
    channels, n_chunks, n_blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, LOG_ROWS: tl.constexpr, UNROLL: tl.constexpr,
    HAS_FIRST: tl.constexpr, BACKWARD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Replace what each chunk adds to the state by the state that enters it, in place.

    p_state (B, NC, N, D); the decay of a chunk is exp(A p_sum), p_sum (B, NC, D). BACKWARD runs
    from the last chunk to the first, for the gradient of the state, from p_first (B, D, N). What
    the chunk visited last has in both is read and has no effect: no sweep computes it.

    Each of 2^LOG_ROWS rows has a run of chunks. It first sums up the run before its own; with all
    rows before it that is the state before its own run, through which it then goes.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    n = (pid // n_blocks) % N
    i_b = pid // (n_blocks * N)
    channels = tl.cast(channels, tl.int64)  # a constant when there is one channel
    ROWS: tl.constexpr = 1 << LOG_ROWS
    o_r = tl.arange(0, ROWS)[:, None]
    o_d = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_d = o_d < channels
    b_A = tl.load(p_A + o_d * N + n, mask=m_d, other=0.0) * LOG2E
    p_sum += i_b * n_chunks * channels + o_d
    p_state += (i_b * n_chunks * N + n) * channels + o_d
    run = tl.cdiv(n_chunks, ROWS)
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)

    b_h = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_FIRST:
        p_first += (i_b * channels + o_d) * N + n
        b_h = tl.load(p_first + o_r * 0, mask=m_d & (o_r == 0), other=0.0)
    # The loads of several chunks are in flight together; only the multiply-adds are in turn. What
    # is not there is a chunk of no steps.
    if ROWS > 1:
        for c0 in range(0, run, UNROLL):
            add_k = ()
            sum_k = ()
            for k in tl.static_range(UNROLL):
                c = (o_r - 1) * run + c0 + k
                m_c = m_d & (c >= 0) & (c < n_chunks) & (c0 + k < run)
                if BACKWARD:
                    c = n_chunks - 1 - c
                sum_k = sum_k + (tl.load(p_sum + c * channels, mask=m_c, other=0.0),)
                add_k = add_k + (tl.load(p_state + c * N * channels, mask=m_c, other=0.0),)
            for k in tl.static_range(UNROLL):
                b_h = tl.exp2(b_A * sum_k[k]) * b_h + add_k[k]
                b_sum += sum_k[k]
        _, b_h = tl.associative_scan((tl.exp2(b_A * b_sum), b_h), 0, one_after_the_other)
        # The states are overwritten by other threads of this program than those that read them.
        tl.debug_barrier()
    for c0 in range(0, run, UNROLL):
        add_k = ()
        sum_k = ()
        for k in tl.static_range(UNROLL):
            c = o_r * run + c0 + k
            m_c = m_d & (c < n_chunks) & (c0 + k < run)
            if BACKWARD:
                c = n_chunks - 1 - c
            sum_k = sum_k + (tl.load(p_sum + c * channels, mask=m_c, other=0.0),)
            add_k = add_k + (tl.load(p_state + c * N * channels, mask=m_c, other=0.0),)
        for k in tl.static_range(UNROLL):
            c = o_r * run + c0 + k
            m_c = m_d & (c < n_chunks) & (c0 + k < run)
            if BACKWARD:
                c = n_chunks - 1 - c
            tl.store(p_state + c * N * channels, b_h, mask=m_c)
            b_h = tl.exp2(b_A * sum_k[k]) * b_h + add_k[k]


@triton.jit
def program_place(groups, n_chunks, n_blocks):
    """Block of channels, group, chunk (of so many) and batch item of a program of a sweep."""
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % n_blocks
    i_g = (pid // n_blocks) % groups
    i_c = (pid // (n_blocks * groups)) % n_chunks
    return i_block, i_g, i_c, pid // (n_blocks * groups * n_chunks)


@triton.jit
def entry_at(p_order, s, length, ORDER: tl.constexpr, REVERSE: tl.constexpr):
    """What the table says of position s, for :func:`token_of`; without a table nothing is loaded.

    Positions before the start and behind the end repeat the first and the last one, so that loads
    of what comes next need no mask.
    """
    position = tl.maximum(tl.minimum(s, length - 1), 0)
    if REVERSE:
        position = length - 1 - position
    if ORDER:
        return tl.load(p_order + position)
    else:
        return position


@triton.jit
def entries_at(p_order, s0, length, K: tl.constexpr, ORDER: tl.constexpr, REVERSE: tl.constexpr):
    """:func:`entry_at` for K positions from s0 on."""
    entry_k = ()
    for k in tl.static_range(K):
        entry_k = entry_k + (entry_at(p_order, s0 + k, length, ORDER, REVERSE),)
    return entry_k


@triton.jit
def token_of(entry, s, length, ORDER: tl.constexpr, REVERSE: tl.constexpr):
    """Index of the token visited at position s, and whether there is one (a table may say -1)."""
    if ORDER == HOLES:
        return tl.maximum(entry, 0), entry >= 0
    elif ORDER == PERMUTED:
        return entry, s >= 0
    else:  # cheaper again than carried through a loop
        return entry_at(entry, s, length, False, REVERSE), s >= 0
