"""Both passes of the Triton scan: what a call allocates and launches, worked out once per kind.

B batch, G groups, H channels per group, D = G H, L tokens, N state, NC chunks. Tensors over tokens
are (B, G, H, L) or, with the groups side by side, (B, D, L); B and C are (B, G, N, L) or, for one
group, (B, N, L). The inputs of a pass are u, delta, A, B, C, D, z, delta_bias and the order, in
this sequence.
"""

import functools
import math

import torch
from torch import Tensor

from . import plan as plans
from .launch import Launch, Place, Program, describe

__all__ = [
    'Backward', 'Forward', 'backward', 'find', 'forget', 'forward', 'processors', 'remember',
]

# Elements from which on a channel-major tensor is copied to token-major.
_COPY_ABOVE = 1 << 18
# Chunks up to which the last sweep of a forward pass carries the states itself: every program reads
# what all chunks before its own added, which for many chunks is far more than all else it reads.
_FEW_CHUNKS = 16
# Bytes that the start of everything in a shared buffer is a multiple of.
_ALIGN = 128
# Kinds of calls that are kept in mind; a training run over many image sizes meets hundreds.
_MOST = 4096
_INPUTS = 9
_GRADIENTS = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # the interpreter and meta tensors: any number, but always the same


class _Shape:
    """Sizes and launch plan of a call."""

    def __init__(self, inputs, gradients: bool, chunk: int):
        u, _, A, B, *_, order = inputs
        self.batch, self.tokens = u.shape[0], u.shape[-1]
        self.groups = B.shape[1] if B.dim() == 4 else 1
        self.channels, self.state = A.shape
        self.group_dim = self.channels // self.groups
        self.length = self.tokens if order is None else order.shape[-1]
        self.plan = plans.launch_plan(
            self.batch, self.groups, self.group_dim, self.length, self.state, processors(u.device),
            gradients=gradients, chunk=chunk,
        )

    @property
    def states(self) -> tuple[int, ...]:
        """Of the states at the starts of the chunks; none when there is one chunk."""
        n_chunks = self.plan.n_chunks
        return (self.batch, n_chunks if n_chunks > 1 else 0, self.state, self.channels)

    def programs(self, cut: plans.Cut, n_chunks: int) -> int:
        return self.batch * n_chunks * self.groups * -(-self.group_dim // cut.block)

    def strides(self, **tensors: Tensor | tuple[int, ...] | None) -> dict[str, int]:
        """Kernel arguments: strides over batch, group, channel (or state) and token."""
        found = {}
        for name, x in tensors.items():
            axes = 'bgnl' if name in 'BC' else 'bgdl'
            steps = (0,) * 4 if x is None else x if isinstance(x, tuple) else self._steps(x)
            found |= {f'{name}_s{axis}': step for axis, step in zip(axes, steps, strict=True)}
        return found

    def _steps(self, x: Tensor) -> tuple[int, ...]:
        if x.dim() == 4:
            return x.stride()
        batch, channel, token = x.stride()
        return batch, x.shape[1] // self.groups * channel, channel, token

    def kind_of_order(self, order: Tensor | None) -> int:
        """Of the kernels' constants: a table of as many positions as tokens has no holes."""
        return 0 if order is None else 1 if self.length == self.tokens else 2

    def common(self, inputs, softplus: bool, reverse: bool, cut: plans.Cut) -> dict:
        """Arguments that the kernels of both passes share."""
        *_, z, bias, order = inputs
        return dict(
            order_sg=0 if order is None or order.shape[0] == 1 else order.stride(0),
            group_dim=self.group_dim,
            groups=self.groups,
            length=self.length,
            chunk=self.plan.chunk,
            n_chunks=self.plan.n_chunks,
            n_blocks=-(-self.group_dim // cut.block),
            N=self.state,
            BLOCK=cut.block,
            HAS_Z=z is not None,
            HAS_BIAS=bias is not None,
            SOFTPLUS=softplus,
            ORDER=self.kind_of_order(order),
            REVERSE=reverse,
            EVEN=self.group_dim % cut.block == 0,
            num_warps=1,
        )

    def carry(self, kernels, states: Place, sums: Place, first: Place | None, backward: bool):
        n_blocks = -(-self.channels // 32)
        return Launch(
            'scan_carry_kernel',
            (self.batch * self.state * n_blocks,),
            dict(p_state=states, p_sum=sums, p_A=Place(2), p_first=first),
            dict(
                channels=self.channels, n_chunks=self.plan.n_chunks, n_blocks=n_blocks,
                N=self.state, BLOCK=32, UNROLL=8, HAS_FIRST=first is not None,
                BACKWARD=backward, **carry_rows(self.plan.n_chunks),
            ),
        )


def state_shape(
    u: Tensor, A: Tensor, B: Tensor, order: Tensor | None, gradients: bool, chunk: int
) -> tuple[int, ...]:
    """Of the states that a forward pass leaves for the backward pass, (B, NC, N, D)."""
    return _Shape((u, None, A, B, *(None,) * 4, order), gradients, chunk).states


def token_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense (B, ..., channels, L) whose channels are neighbours in memory."""
    *inner, length = shape[1:]
    row = math.prod(inner)
    steps = [math.prod(inner[i + 1 :]) for i in range(len(inner))]
    return (length * row, *steps, row)


def state_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense (B, ..., N, L) whose states are neighbours in memory, token by token."""
    *outer, state, length = shape
    steps = [math.prod(outer[i + 1 :]) * state * length for i in range(len(outer))]
    return (*steps, 1, state)


def lanes(x: Tensor | None) -> Tensor | None:
    """Copy a large (B, ..., channels, L) whose channels are far apart.

    A warp reads 32 channels at once; spread over memory they cost 32 accesses instead of one or
    two, which is far more than a copy. Small tensors stay in the cache and gain nothing.
    """
    if x is None or x.stride(-2) <= 1 or x.numel() < _COPY_ABOVE:
        return x
    # Groups that share a tensor share its copy.
    copy = x[:, :1] if x.dim() == 4 and x.stride(1) == 0 else x
    return copy.transpose(-2, -1).contiguous().transpose(-2, -1).expand(x.shape)


def packs(B: Tensor, C: Tensor) -> bool:
    """Whether the N values of B and C for any token are whole words of 64 bits in memory."""
    return all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-2] % 4 == 0
        and x.stride(-2) == 1
        and x.data_ptr() % 8 == 0
        and all(x.stride(i) % 4 == 0 or x.shape[i] == 1 for i in (*range(x.dim() - 2), -1))
        for x in (B, C)
    )


def carry_rows(n_chunks: int) -> dict[str, int]:
    """Rows of the carry kernel, and warps for four of them each: some eight chunks for a row.

    A row costs its instructions with one chunk or none as well, and a batch of many short sequences
    has thousands of programs. Three numbers of rows, so that few kernels are compiled.
    """
    log_rows = 0 if n_chunks <= 8 else 3 if n_chunks <= 64 else 5
    return dict(LOG_ROWS=log_rows, num_warps=max(1, 2**log_rows // 4))


def is_wide(arguments: dict, tokens: int) -> bool:
    """Whether the index of a token times one of the strides does not fit 32 bits."""
    return tokens * max(step for name, step in arguments.items() if name.endswith('_sl')) >= 2**31


def in_turn(launches: list[Launch], overlap: bool) -> list[Launch]:
    """The launches of a call; they overlap if all but the first are launched ahead and wait."""
    ahead = dict(launch_pdl=True) if overlap else {}
    return [
        launch._replace(constants=launch.constants | dict(OVERLAP=overlap) | (ahead if i else {}))
        for i, launch in enumerate(launches)
    ]


def most_registers(cut: plans.Cut, state: int, packed: bool, more: bool) -> dict[str, int]:
    """Most registers of a thread of the forward kernel, an option of its launch.

    Left alone the compiler aims at 64, which one-warp programs cannot turn into more warps, and
    puts the loads off. ``more`` is for a gate, the chunks before, or steps without softplus, which
    the compiler computes further ahead. AMD's compiler has no such option.
    """
    if torch.version.hip:
        return {}
    if cut.registers:
        return dict(maxnreg=cut.registers)
    if state <= 2:
        return dict(maxnreg=80)
    if cut.block == 32 and state <= 8 and packed:
        return dict(maxnreg=96 if more else 80)
    return dict(maxnreg=128 if cut.block == 32 and (state <= 8 or packed) else 168)


def most_registers_backward(
    cut: plans.Cut, state: int, packed: bool, gate: bool
) -> dict[str, int]:
    """Most registers of a thread of the main backward kernel, an option of its launch.

    With 128 a multiprocessor holds 16 warps, with up to 168 it holds 12. Left alone the compiler
    takes 168 for 8 states and for one in ragged blocks of 64 channels, which it does not need. A
    gate, more states, and states that are no words need more than 128.
    """
    if torch.version.hip:
        return {}
    if cut.registers:
        return dict(maxnreg=cut.registers)
    if gate or state > 8 or not (packed or state <= 2):
        return {}
    return dict(maxnreg=128)


class _Pass:
    """What the passes have in common: inputs that are copied first, and the program."""

    def __init__(self, tensors, may_copy: tuple[int, ...]):
        copies = {i: lanes(tensors[i]) for i in may_copy}
        self.copies = tuple(i for i, x in copies.items() if x is not tensors[i])
        self.laid = [copies.get(i, x) for i, x in enumerate(tensors)]

    def _copied(self, tensors, pointers):
        """Neighbours for the lanes of a warp, where they are too far apart."""
        tensors, pointers = list(tensors), list(pointers)
        for i in self.copies:
            tensors[i] = lanes(tensors[i])
            pointers[i] = tensors[i].data_ptr()
        return tensors, pointers


class Forward(_Pass):
    """One kind of forward pass."""

    def __init__(
        self, inputs, out: Tensor | None, softplus: bool, reverse: bool, gradients: bool,
        chunk: int, *, last: bool = True, starts: bool = False,
    ):
        from . import kernels

        super().__init__(inputs, (0, 1, 6))
        inputs = self.laid
        u, delta, A, B, C, D, z, bias, order = inputs
        shape = self.shape = _Shape(inputs, gradients, chunk)
        plan, cut = shape.plan, shape.plan.forward
        self.size, self.stride = tuple(u.shape), token_major(u.shape)
        self.last = (shape.batch, *A.shape) if last else None
        n_states = math.prod(shape.states)
        n_sums = n_states // shape.state
        # A few chunks are carried by the last sweep itself, which leaves the states before them.
        # What it reads then lies in memory that goes with the pass.
        few = 1 < plan.n_chunks <= _FEW_CHUNKS and not starts
        states, added = Place(11), Place(12 if few else 11)
        sums = Place(added.tensor, 4 * n_states, torch.float32)
        last_state = Place(11, 4 * (n_states if few else n_states + n_sums), torch.float32)
        places = dict(
            p_u=Place(0), p_delta=Place(1), p_A=Place(2), p_B=Place(3), p_C=Place(4),
            p_D=None if D is None else Place(5), p_z=None if z is None else Place(6),
            p_bias=None if bias is None else Place(7),
            p_order=None if order is None else Place(8), p_out=Place(9),
            p_last=Place(10) if last else last_state, p_state=added, p_sum=sums, p_start=states,
        )
        self.passing = n_states + n_sums if few else 0
        self.work = n_states + (0 if few else n_sums) + (0 if last else shape.batch * A.numel())
        into, packed = self._out_strides(out), packs(B, C)
        constants = (
            shape.common(inputs, softplus, reverse, cut)
            | shape.strides(u=u, delta=delta, B=B, C=C, z=z, out=into)
            | dict(UNROLL=cut.unroll, AHEAD=4 if shape.state <= 2 else 2, HAS_D=D is not None)
            | dict(PACK=packed)
        )
        constants['WIDE'] = is_wide(constants, shape.tokens)

        def sweep(mode):
            grid = (shape.programs(cut, plan.n_chunks - (mode is kernels.AGGREGATE)),)
            more = z is not None or not softplus or mode is kernels.FEW
            registers = most_registers(cut, shape.state, packed, more)
            return Launch(
                'scan_forward_kernel', grid, places,
                constants | dict(MODE=mode.value) | registers,
            )

        launches = []
        if plan.n_chunks > 1:
            launches.append(sweep(kernels.AGGREGATE))
        if plan.n_chunks > 1 and not few:
            launches.append(shape.carry(kernels, states, sums, None, backward=False))
        if not starts:
            mode = kernels.FEW if few else kernels.FINAL
            launches.append(sweep(mode if plan.n_chunks > 1 else kernels.SINGLE))
        self.program = Program(kernels, in_turn(launches, plan.overlap))
        del self.laid

    def _out_strides(self, out):
        if out is not None:
            return out.stride()
        if len(self.stride) == 4:
            return self.stride
        batch, channel, token = self.stride
        return batch, self.shape.group_dim * channel, channel, token

    def run(self, inputs, pointers, out=None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output, the last state (None where it is not asked for), and the states at the
        starts of the chunks with other values behind them, flat."""
        if self.copies:
            inputs, pointers = self._copied(inputs, pointers)
        A = inputs[2]
        if out is None:
            out = inputs[0].new_empty_strided(self.size, self.stride)
        last = None if self.last is None else A.new_empty(self.last)
        work = A.new_empty(self.work)
        passing = A.new_empty(self.passing) if self.passing else None
        mine = [None if x is None else x.data_ptr() for x in (out, last, work, passing)]
        self.program.run((*inputs, out, last, work, passing), (*pointers, *mine))
        return out, last, work


class Backward(_Pass):
    """One kind of backward pass."""

    def __init__(
        self, tensors, given, softplus: bool, reverse: bool, gradients: bool, chunk: int
    ):
        from . import kernels

        super().__init__(tensors, (0, 1, 6, 9))
        inputs, (dout, dlast, _) = self.laid[:_INPUTS], self.laid[_INPUTS:]
        u, delta, A, B, C, D, z, bias, order = inputs
        shape = self.shape = _Shape(inputs, gradients, chunk)
        self.views: list[tuple | None] = []
        self.sizes = [0, 0]  # bytes of the buffer over tokens with the scratch, and of parameters
        where = self._gradients(inputs, given)
        plan, cut = shape.plan, shape.plan.backward
        n_blocks = -(-shape.group_dim // cut.block)
        runs = -(-shape.length // plans.RUN)
        rows = shape.batch * plan.n_chunks
        width = shape.state * shape.channels
        n_runs = shape.batch * shape.groups * n_blocks * runs * shape.state
        scratch = self._scratch(n_runs * cut.block)
        dbc = self._scratch(n_runs * 2 * plans.RUN)
        dchannel = self._scratch(rows * (shape.state + 2) * shape.channels)
        gstates = self._scratch(rows * width) if plan.n_chunks > 1 else None
        first = None if dlast is None else Place(10)

        def present(x, place):
            return None if x is None else place

        ordered = present(order, Place(8))
        places = dict(
            p_delta=Place(1), p_A=Place(2), p_C=Place(4), p_z=present(z, Place(6)),
            p_bias=present(bias, Place(7)), p_order=ordered, p_dout=Place(9),
        )
        common = shape.common(inputs, softplus, reverse, cut)
        constants = common | shape.strides(delta=delta, C=C, z=z, dout=dout)
        constants |= dict(K=plans.RUN, PACK=packs(B, C))
        main = constants | shape.strides(u=u, B=B, **self._token_strides(inputs, given))
        constants['WIDE'], main['WIDE'] = (is_wide(x, shape.tokens) for x in (constants, main))
        launches = []
        if plan.n_chunks > 1:
            sums = self._scratch(rows * shape.channels)
            launches += [
                Launch(
                    'scan_backward_aggregate_kernel', (shape.programs(cut, plan.n_chunks - 1),),
                    places | dict(p_state=gstates, p_sum=sums), constants,
                ),
                shape.carry(kernels, gstates, sums, first, backward=True),
            ]
        over_blocks = -(-shape.length * shape.state // 256) * shape.batch * shape.groups
        launches += [
            Launch(
                'scan_backward_kernel', (shape.programs(cut, plan.n_chunks),),
                places | dict(
                    p_u=Place(0), p_B=Place(3), p_D=present(D, Place(5)), p_state=Place(11),
                    p_gstate=gstates, p_dlast=first, p_scratch=scratch, p_du=where['u'],
                    p_ddelta=where['delta'], p_dz=where.get('z'), p_dbc=dbc, p_dchannel=dchannel,
                ),
                main
                | dict(
                    SOME=4 if constants['PACK'] else 1 + (shape.state % 2 == 0),
                    CHUNKED=plan.n_chunks > 1,
                    HAS_DLAST=dlast is not None, HAS_D=D is not None,
                )
                | most_registers_backward(cut, shape.state, constants['PACK'], z is not None),
            ),
            Launch(
                'sum_gradients_kernel',
                (over_blocks + -(-shape.channels // 32) * (shape.state + 2),),
                dict(
                    p_dbc=dbc, p_dB=where['B'], p_dC=where['C'], p_dchannel=dchannel,
                    p_dA=where['A'], p_dD=where.get('D'), p_dbias=where.get('delta_bias'),
                    p_order=ordered,
                ),
                dict(
                    order_sg=common['order_sg'], groups=shape.groups, length=shape.length,
                    tokens=shape.tokens, n_blocks=n_blocks,
                    row=shape.state if given[3] is None else given[3].stride(-1),
                    channels=shape.channels, rows=rows, over_blocks=over_blocks,
                    N=shape.state, K=plans.RUN, COLS=256, HAS_D=D is not None,
                    HAS_BIAS=bias is not None, ORDER=common['ORDER'], REVERSE=reverse,
                ),
            ),
        ]
        self.program = Program(kernels, in_turn(launches, plan.overlap))
        del self.laid

    def _gradients(self, inputs, given) -> dict[str, Place]:
        """Where each gradient goes; those over tokens and those of parameters in one buffer each.

        Gradients of parameters live as long as the parameters: they must not hold a buffer over
        tokens.
        """
        where = {}
        for i, (name, x, own) in enumerate(zip(_GRADIENTS, inputs[:8], given, strict=True)):
            if x is None or own is not None:
                self.views.append(None)
                if x is not None:
                    where[name] = Place(14 + i)
                continue
            buffer = int(name in ('A', 'D', 'delta_bias'))
            place = where[name] = self._reserve(buffer, x.numel(), x.dtype)
            if buffer:
                stride = (x.shape[-1], 1)[-x.dim() :]
            else:
                stride = (state_major if name in 'BC' else token_major)(x.shape)
            dtype = None if x.dtype == torch.float32 else x.dtype
            self.views.append((buffer, dtype, tuple(x.shape), stride, place.offset // x.itemsize))
        return where

    def _token_strides(self, inputs, given) -> dict[str, tuple[int, ...] | Tensor | None]:
        found = {}
        for i, name in ((0, 'du'), (1, 'ddelta'), (6, 'dz')):
            x = inputs[i]
            found[name] = given[i]
            if x is not None and given[i] is None:
                batch, *inner, token = token_major(x.shape)
                found[name] = (
                    batch, *(inner if len(inner) == 2 else (self.shape.group_dim, 1)), token
                )
        return found

    def _reserve(self, buffer: int, numel: int, dtype: torch.dtype) -> Place:
        offset = self.sizes[buffer]
        self.sizes[buffer] += -(-numel * dtype.itemsize // _ALIGN) * _ALIGN
        return Place(12 + buffer, offset, dtype)

    def _scratch(self, numel: int) -> Place:
        return self._reserve(0, numel, torch.float32)

    def run(self, tensors, pointers, given=(None,) * 8, addresses=(None,) * 8):
        """The eight gradients; None for absent inputs and for those written into ``given``."""
        if self.copies:
            tensors, pointers = self._copied(tensors, pointers)
        A = tensors[2]
        tokens = A.new_empty(self.sizes[0] // 4)
        parameters = A.new_empty(self.sizes[1] // 4) if self.sizes[1] else None
        buffers, kinds = (tokens, parameters), {}
        mine = tokens.data_ptr(), None if parameters is None else parameters.data_ptr()
        self.program.run((*tensors, *buffers, *given), (*pointers, *mine, *addresses))
        grads = []
        for view in self.views:
            if view is None:
                grads += (None,)
                continue
            buffer, dtype, size, stride, offset = view
            kind = buffer, dtype
            if kind not in kinds:
                base = buffers[buffer]
                kinds[kind] = base if dtype is None else base.view(dtype)
            grads += (kinds[kind].as_strided(size, stride, offset),)
        return grads


_FORWARD: dict[tuple, Forward] = {}
_BACKWARD: dict[tuple, Backward] = {}


def forward(
    inputs, softplus: bool, reverse: bool, gradients: bool, chunk: int = 0,
    out: Tensor | None = None, starts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state (B, D, N) and states at the starts of the chunks (B, NC, N, D).

    Args:
        inputs: the nine inputs, parameters in float32 and contiguous.
        softplus: pass delta (after its bias) through softplus.
        reverse: visit the tokens from right to left.
        gradients: whether a backward pass follows, whose time the chunks then consider.
        chunk: tokens per chunk if not 0.
        out: (B, G, H, L), any view of u's shape to write into.
        starts: leave the output alone and compute the states only.
    """
    flags = softplus, reverse, gradients, chunk

    def make():
        return Forward(inputs, out, *flags, starts=starts)

    known, pointers = find(_FORWARD, (*inputs, out), (*flags, starts), make)
    y, last, work = known.run(inputs, pointers[:_INPUTS], out)
    states = known.shape.states
    return y, last, work[: math.prod(states)].view(states)


def backward(
    dout: Tensor, dlast: Tensor | None, inputs, states: Tensor, softplus: bool, reverse: bool,
    gradients: bool, chunk: int = 0, given=(None,) * 8,
) -> list[Tensor | None]:
    """The eight gradients; those that have a place in ``given`` are written there.

    Args:
        dout: of the output.
        dlast: of the last state, contiguous, or None.
        inputs: as in the forward pass.
        states: what it left at the starts of the chunks.
        softplus, reverse, gradients, chunk: as in the forward pass.
        given: for each gradient a tensor or None; a (B, 1, N, L) for dB and dC has the N values of
            a token side by side and sequences that follow one another, such as columns of the
            gradient of a projection.
    """
    flags = softplus, reverse, gradients, chunk
    tensors = (*inputs, dout, dlast, states)
    known, pointers = find(
        _BACKWARD, (*tensors, *given), flags, lambda: Backward(tensors, given, *flags)
    )
    return known.run(tensors, pointers[:12], given, pointers[12:])


def find(known: dict, tensors, flags: tuple, make) -> tuple:
    """The pass for tensors of this description, and their addresses."""
    found = describe(tensors)
    if found is None:
        return make(), [None if x is None else x.data_ptr() for x in tensors]
    pointers, description = found
    key = (flags, *description)
    one = known.get(key)
    if one is None:
        one = make()
        remember(known, key, one)
    return one, pointers


def remember(known: dict, key: tuple, one) -> None:
    """Keep in mind what has been worked out for a key."""
    if len(known) >= _MOST:
        known.clear()
    known[key] = one


def forget() -> None:
    """Work everything out again, for tests that change how."""
    _FORWARD.clear()
    _BACKWARD.clear()
