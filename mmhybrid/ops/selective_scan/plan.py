"""How a scan is cut into programs of the Triton kernels: a pure function of its shape.

B batch, G groups, H channels per group, L tokens, N state. The times are those of a model. Its
figures for the kernels of one commit are fitted to plans that a GPU measured
(`tools/benchmark/results/scan_plans.csv`); `tools/benchmark/plans.py` fits them again and says how
far off they are. Those for the present kernels are derived from them by what has changed, and wait
for a measurement.
"""

import functools
from typing import NamedTuple

__all__ = ['Cut', 'LaunchPlan', 'launch_plan']

#: Commit of the kernels whose figures are measured, as the rows of the sweep name it.
KERNELS = '03c1dbf'
#: Tokens between two checkpoints of the state in the backward pass.
RUN = 4
# Lengths of a chunk that are weighed against one another, and against the whole sequence.
_CHUNKS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
# Parts up to which a sequence is also cut into equal ones.
_PARTS = 6
# Tokens that the beginning and the end of a program cost, whatever its chunk.
_ENDS = 2
# Warps on a multiprocessor that is far from full.
_FEW = 4


class Cut(NamedTuple):
    """The programs of one pass.

    Attributes:
        block: channels of one program, which is one warp.
        unroll: tokens whose loads are in flight together.
        registers: most registers of a thread in the sweeps that take the most time; 0 for what
            `passes.most_registers` and its twin say.
    """

    block: int
    unroll: int
    registers: int = 0


class LaunchPlan(NamedTuple):
    """How one scan is cut into programs.

    Attributes:
        chunk: tokens of one program, a multiple of both unrolls and of the backward pass's run.
        n_chunks: chunks of the sequence; 1 needs one launch, up to 16 need two, more need three.
        forward: programs of the forward pass.
        backward: programs of the backward pass.
        overlap: whether programs of a launch may begin before all of the launch before have ended,
            and wait inside for what those write. Needs compute capability 9.0 and Triton 3.4; no
            plan does so before a GPU has compared.
    """

    chunk: int
    n_chunks: int
    forward: Cut
    backward: Cut
    overlap: bool = False


class Cost(NamedTuple):
    """Microseconds of a pass with blocks of one width, each for N = 1 and for N = 8.

    Attributes:
        wait: a token of a warp that has its multiprocessor to itself.
        work: a token of every warp beside it.
    """

    wait: tuple[float, float]
    work: tuple[float, float]


class Pass(NamedTuple):
    """The costs of the forward or of the backward pass.

    Attributes:
        launches: microseconds of the launches of a cut sequence, and of a whole one.
        carry: microseconds of the carry kernel per chunk.
        cut: costs by block where the sequence is cut.
        whole: costs by block where one program takes all of it.
        resident: by block, warps that a multiprocessor holds for N = 1, 2, up to 8, and more: what
            the registers of the compiled kernels allow.
        widest: the largest N for which a program may have 64 channels.
    """

    launches: tuple[float, float]
    carry: float
    cut: dict[int, Cost]
    whole: dict[int, Cost]
    resident: dict[int, tuple[int, int, int, int]]
    widest: int = 8


# Measured, of the kernels of that commit.
FORWARD = Pass(
    launches=(2.0, 1.0),
    carry=0.0365,
    cut={32: Cost((0.240, 0.566), (0.0238, 0.0431)), 64: Cost((0.267, 0.871), (0.0322, 0.0680))},
    whole={32: Cost((0.171, 0.485), (0.0, 0.0224)), 64: Cost((0.215, 0.288), (0.0467, 0.0489))},
    resident={32: (32, 32, 32, 24), 64: (28, 32, 18, 15)},
)
BACKWARD = Pass(
    launches=(2.0, 1.0),
    carry=0.010,
    cut={32: Cost((0.418, 1.342), (0.0416, 0.1089)), 64: Cost((0.555, 1.277), (0.0625, 0.1880))},
    whole={32: Cost((0.496, 1.915), (0.0, 0.0702)), 64: Cost((0.561, 1.246), (0.0493, 0.1462))},
    resident={32: (16, 12, 12, 12), 64: (14, 10, 8, 8)},
)


def _changed(
    measured: Pass, *, wait: tuple[float, float], work: tuple[float, float], **figures
) -> Pass:
    """A pass whose waits and works are so many times those measured, for N = 1 and for N = 8."""

    def scaled(part: dict[int, Cost]) -> dict[int, Cost]:
        return {
            block: Cost(
                *(tuple(x * factor for x, factor in zip(values, factors, strict=True))
                  for values, factors in ((cost.wait, wait), (cost.work, work)))
            )
            for block, cost in part.items()
        }

    return measured._replace(cut=scaled(measured.cut), whole=scaled(measured.whole), **figures)


# Expected of the present kernels; no GPU has run them. The kernels before them, of commit 6bdc1ab,
# ran a few plans on a GPU, seven of the sweep and those of three more shapes: enough to scale the
# figures above by hand, no more. Their launches cost 5 and 4 us; waits and works of N = 8 were 0.68
# and 0.69 of those above in the forward pass (RMS of log(model / row) 0.06), 0.4 and 0.65 in the
# backward pass (0.07, without classification s3, where the carry took time that the model does not
# have), works of N = 1 1.0 and 0.80. Works then follow the instructions of the loops, counted for
# sm_90, which addresses of 32 bits and cheaper softplus and its slope have made fewer: forward 852
# to 716 for four tokens of N = 8 and 731 to 579 of N = 1, all backward sweeps 2183 to 2069 and 1326
# to 1167. (Tables without holes save another 70 and 60 for N = 1.) Resident warps follow the
# registers, of the backward sweeps four at a time, one for each part of a multiprocessor: 128
# registers leave 16 warps. Beyond two states the backward sweeps have blocks of 32 channels only.
EXPECTED = (
    _changed(
        FORWARD, wait=(0.65, 0.68), work=(0.80, 0.59), launches=(5.0, 3.0), carry=0.007,
        resident={32: (25, 25, 25, 16), 64: (25, 25, 12, 12)},
    ),
    _changed(
        BACKWARD, wait=(0.65, 0.4), work=(0.70, 0.615), launches=(4.0, 3.0), carry=0.007,
        resident={32: (16, 12, 16, 8), 64: (16, 8, 8, 8)}, widest=2,
    ),
)


def waves(
    sequences: int, length: int, chunk: int, resident: int, processors: int
) -> tuple[float, float]:
    """Tokens that follow one another on a multiprocessor, and tokens of all warps on it.

    Programs come in waves of as many as fit; the last wave may be small. A last chunk that is
    short counts for what it has.
    """
    n_chunks = -(-length // chunk)
    tokens = min(chunk, length) + _ENDS
    programs = sequences * (length + n_chunks * _ENDS) / tokens
    full, rest = divmod(programs, processors * resident)
    more = rest > 1e-6
    load = full * resident + (max(rest / processors, 1) if more else 0)
    return tokens * (full + more), tokens * load


def _for_state(figures: tuple[float, float], state: int) -> float:
    """Between the two measured N and beyond them a straight line."""
    one, eight = figures
    return one + (eight - one) * (state - 1) / 7


def resident_warps(which: Pass, block: int, state: int) -> int:
    """Warps that a multiprocessor holds of a pass's kernel."""
    return which.resident[block][0 if state == 1 else 1 if state == 2 else 2 if state <= 8 else 3]


def _block(which: Pass, whole: bool, group_dim: int, state: int) -> int:
    """Channels of a program; the same for every batch and length, which so compile nothing new.

    Weighed is a token on a full machine, and on one that holds a few warps each.
    """
    if state > which.widest:  # the states of 64 channels would not fit the registers
        return 32

    def time(block):
        cost = (which.whole if whole else which.cut)[block]
        wait, work = _for_state(cost.wait, state), _for_state(cost.work, state)
        full = wait / resident_warps(which, block, state) + work
        return full * -(-group_dim // block) + wait / _FEW

    return min((32, 64), key=time)


def pass_time(
    which: Pass, block: int, chunk: int, rows: int, group_dim: int, length: int, state: int,
    processors: int,
) -> float:
    """Microseconds of a pass over B x G rows in programs of ``block`` channels."""
    n_chunks = -(-length // chunk)
    cost = (which.cut if n_chunks > 1 else which.whole)[block]
    resident = resident_warps(which, block, state)
    in_turn, load = waves(rows * -(-group_dim // block), length, chunk, resident, processors)
    fixed = which.launches[0] + which.carry * n_chunks if n_chunks > 1 else which.launches[1]
    return fixed + _for_state(cost.wait, state) * in_turn + _for_state(cost.work, state) * load


def launch_plan(
    batch: int, groups: int, group_dim: int, length: int, state: int, processors: int, *,
    gradients: bool, chunk: int = 0,
) -> LaunchPlan:
    """The plan with the least expected time for B x G sequences of H channels and L tokens.

    Args:
        batch: B.
        groups: G.
        group_dim: H.
        length: L.
        state: N.
        processors: multiprocessors of the GPU.
        gradients: whether a backward pass follows, which shares the chunks; its time then counts.
        chunk: tokens per chunk if not 0, rounded up; for tests and for tuning.

    Raises:
        ValueError: a negative chunk.
    """
    # Sizes that a tracer keeps open become those that it has seen: another size is traced again.
    sizes = (int(x) for x in (batch * groups, group_dim, length, state, processors, chunk))
    return _own_choice(*sizes, bool(gradients))


@functools.lru_cache(maxsize=4096)
def _own_choice(*arguments) -> LaunchPlan:
    return choose(EXPECTED, *arguments, parts=_PARTS)


def choose(
    passes: tuple[Pass, Pass], rows: int, group_dim: int, length: int, state: int, processors: int,
    chunk: int, gradients: bool, parts: int = 1,
) -> LaunchPlan:
    """:func:`launch_plan` for B x G rows with the given costs of both passes.

    Up to ``parts`` equal parts are weighed, too: they leave no small rest to a program of its own.
    """
    if chunk < 0:
        raise ValueError(f'launch_plan expects a chunk of 0 (its own choice) or more, got {chunk}.')
    rows, group_dim, length = max(1, rows), max(1, group_dim), max(1, length)

    def block(which, chunk):
        return _block(which, chunk >= length, group_dim, state)

    def time(chunk):
        return sum(
            pass_time(which, block(which, chunk), chunk, rows, group_dim, length, state, processors)
            for which in passes[: 1 + gradients]
        )

    if chunk == 0:
        equal = (-(-length // n // RUN) * RUN for n in range(2, parts + 1))
        cuts = (c for c in (*_CHUNKS, *equal) if _CHUNKS[0] <= c < length)
        chunk = min((*cuts, length), key=time)
    chunk = -(-chunk // RUN) * RUN
    n_chunks = -(-length // chunk)
    forward, backward = (block(which, chunk) for which in passes)
    # Eight tokens together pay where a wide program runs through, and cost registers elsewhere.
    unroll = 8 if n_chunks == 1 and forward == 64 and state > 2 else 4
    chunk = -(-min(chunk, length) // unroll) * unroll
    return LaunchPlan(chunk, n_chunks, Cut(forward, unroll), Cut(backward, 4))
