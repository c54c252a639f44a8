"""The Triton backend of the selective scan: launchers, heuristics and PyTorch operators.

B batch, G groups, H channels per group, D = G H, L tokens, N state, NC chunks. Importing this
file needs no Triton; the kernels are imported when they are first used.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .plan import RUN, LaunchPlan, launch_plan

__all__ = ['LaunchPlan', 'launch_plan', 'scan_grouped', 'scan_into', 'selective_scan_triton']

#: The lowest Triton with which the tests of the kernels have passed.
MINIMUM_TRITON = (3, 6)
#: The lowest compute capability of an NVIDIA GPU for which all kernels have been compiled.
MINIMUM_CAPABILITY = (7, 0)
#: States that one kernel keeps in registers; a larger N is computed in parts of this size.
MAX_STATE = 16
# Elements from which on a channel-major tensor is copied to token-major.
_COPY_ABOVE = 1 << 18


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, so that the kernels run on CPU tensors."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


@torch.compiler.assume_constant_result  # the compiler asks once while it traces
def problem() -> str | None:
    """Why this machine cannot run the Triton kernels, with the remedy; None when it can."""
    return _problem()


@functools.cache
def _problem() -> str | None:
    wanted = '.'.join(map(str, MINIMUM_TRITON))
    if importlib.util.find_spec('triton') is None:
        return f"Triton is not installed; install triton >= {wanted}, or use backend='torch'"
    try:
        import triton
    except Exception as error:  # a broken installation, of which pip knows nothing
        return (
            f'Triton is installed and cannot be imported ({_first_line(error)}); install '
            f"triton >= {wanted} again, or use backend='torch'"
        )
    found = tuple(int(part) for part in triton.__version__.split('.')[:2])
    if found < MINIMUM_TRITON:
        return (
            f'the installed Triton is {triton.__version__} and the scan kernels are proven from '
            f"{wanted} on; upgrade PyTorch (with its Triton), or use backend='torch'"
        )
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; use backend='torch'"
    try:
        # Triton compiles a small C module of its own before anything else.
        triton.runtime.driver.active  # noqa: B018
    except Exception as error:
        return (
            f'Triton cannot start on this machine ({_first_line(error)}); it needs a C compiler, '
            "Python's headers, the driver's libcuda.so.1 and a writable cache (on Ubuntu: apt "
            'install gcc python3-dev; TRITON_CACHE_DIR names another cache), or use '
            "backend='torch'"
        )
    return None


def doubt() -> str | None:
    """Why the kernels are used only by those who ask for them, on a machine that could run them."""
    if torch.version.hip:
        return (
            'the kernels compile for AMD GPUs but have never run on one; try them with '
            "backend='triton'"
        )
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['no message']
    return f'{type(error).__name__}: {lines[0]}'


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take a call with this device and this dtype of the state."""
    if device.type == 'cpu' and not interpreting():
        return "Triton kernels run on a GPU and the tensors are on the CPU; use backend='torch'"
    if dtype != torch.float32:
        return "the Triton kernels compute in float32; use backend='torch' for float64"
    if device.type == 'cuda':
        return _too_old(device.index)
    return None


@torch.compiler.assume_constant_result
def _too_old(index: int | None) -> str | None:
    return _too_old_once(torch.cuda.current_device() if index is None else index)


@functools.cache
def _too_old_once(index: int) -> str | None:
    found = torch.cuda.get_device_capability(index)
    if found >= MINIMUM_CAPABILITY:
        return None
    return (
        f'{torch.cuda.get_device_name(index)} has compute capability {found[0]}.{found[1]} and the '
        f"kernels compile from {'.'.join(map(str, MINIMUM_CAPABILITY))} on; use backend='torch'"
    )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132  # the interpreter and meta tensors: any number, but always the same


def _plan(u: Tensor, state: int, length: int, gradients: bool, chunk: int) -> LaunchPlan:
    batch, groups, heads, _ = u.shape
    processors = _processors(u.device)
    return launch_plan(
        batch, groups, heads, length, state, processors, gradients=gradients, chunk=chunk
    )


def _strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    steps = x.stride() if x is not None else (0,) * len(axes)
    return {f'{name}_s{axis}': step for axis, step in zip(axes, steps, strict=True)}


def _dense(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised (B, ..., channels, L) whose channels are neighbours in memory."""
    batch, *inner, length = shape
    return like.new_empty((batch, length, *inner)).movedim(1, -1)


def _lanes(x: Tensor | None) -> Tensor | None:
    """Copy a large (B, G, H, L) whose channels are far apart.

    A warp reads 32 channels at once; spread over memory they cost 32 accesses instead of one or
    two, which is far more than a copy. Small tensors stay in the cache and gain nothing.
    """
    if x is None or x.stride(2) <= 1 or x.numel() < _COPY_ABOVE:
        return x
    copy = x[:, :1] if x.stride(1) == 0 else x  # groups that share a tensor share its copy
    return copy.transpose(2, 3).contiguous().transpose(2, 3).expand(x.shape)


def _length(u: Tensor, order: Tensor | None) -> int:
    return u.shape[-1] if order is None else order.shape[-1]


def _order_step(order: Tensor | None) -> int:
    return 0 if order is None or order.shape[0] == 1 else order.stride(0)


def _state_shape(
    u: Tensor, A: Tensor, order: Tensor | None, gradients: bool, chunk: int
) -> tuple[int, ...]:
    n_chunks = _plan(u, A.shape[1], _length(u, order), gradients, chunk).n_chunks
    return (u.shape[0], n_chunks if n_chunks > 1 else 0, A.shape[1], A.shape[0])


def _forward(
    u, delta, A, B, C, D, z, delta_bias, order, softplus, reverse, gradients, chunk, out=None,
    starts=False,
):  # fmt: skip
    """Launch the forward kernels; out (B, G, H, L) may be any view of u's shape.

    ``gradients``: a backward pass follows, whose time the chunks consider.
    With ``starts`` only the states at the starts of the chunks are computed, not the output.
    """
    from . import triton_kernels as kernels

    batch, groups, heads, _ = u.shape
    channels, state = A.shape
    length = _length(u, order)
    if out is None:
        out = _dense(u.shape, u)
    last = A.new_empty(batch, channels, state)
    states = A.new_empty(_state_shape(u, A, order, gradients, chunk))
    if u.numel() == 0 or length == 0:
        return out, last.zero_(), states
    u, delta, z = _lanes(u), _lanes(delta), _lanes(z)
    plan = _plan(u, state, length, gradients, chunk)
    block = plan.forward.block
    sums = A.new_empty(batch, states.shape[1], channels)

    shared = dict(
        p_u=u,
        p_delta=delta,
        p_A=A,
        p_B=B,
        p_C=C,
        p_D=D,
        p_z=z,
        p_bias=delta_bias,
        p_order=order,
        p_out=out,
        p_last=last,
        p_state=states,
        **_strides('u', u, 'bgdl'),
        **_strides('delta', delta, 'bgdl'),
        **_strides('B', B, 'bgnl'),
        **_strides('C', C, 'bgnl'),
        **_strides('z', z, 'bgdl'),
        **_strides('out', out, 'bgdl'),
        order_sg=_order_step(order),
        heads=heads,
        groups=groups,
        length=length,
        chunk=plan.chunk,
        n_chunks=plan.n_chunks,
        N=state,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        SOFTPLUS=softplus,
        ORDER=order is not None,
        REVERSE=reverse,
    )

    def launch(mode):
        n_blocks = -(-heads // block)
        kernels.scan_forward_kernel[(batch * plan.n_chunks * groups * n_blocks,)](
            p_sum=sums,
            n_blocks=n_blocks,
            BLOCK=block,
            UNROLL=plan.forward.unroll,
            MODE=mode,
            EVEN=heads % block == 0,
            num_warps=1,
            **shared,
        )

    with torch.cuda.device_of(u):
        if plan.n_chunks > 1:
            launch(kernels.AGGREGATE.value)
            _carry(kernels, states, sums, A, None)
            if not starts:
                launch(kernels.FINAL.value)
        elif not starts:
            launch(kernels.SINGLE.value)
    return out, last, states


def chunk_starts(*inputs) -> Tensor:
    """The states that a forward pass with these inputs leaves for the backward pass.

    At two thirds of the cost: for a backward pass that would rather compute than keep them.
    """
    return _forward(*inputs, out=inputs[0], starts=True)[2]


def _carry(kernels, states, sums, A, first, backward=False):
    batch, n_chunks, state, channels = states.shape
    n_blocks = -(-channels // 32)
    kernels.scan_carry_kernel[(batch * state * n_blocks,)](
        p_state=states,
        p_sum=sums,
        p_A=A,
        p_first=first,
        channels=channels,
        n_chunks=n_chunks,
        n_blocks=n_blocks,
        N=state,
        BLOCK=32,
        UNROLL=8,
        HAS_FIRST=first is not None,
        BACKWARD=backward,
        num_warps=1,
    )


def _gradients_like(u, delta, A, B, C, D, z, delta_bias, into=None):
    """Uninitialised gradients in the layouts that the kernels write; absent ones are empty."""
    batch, groups, state, tokens = B.shape
    none = A.new_empty(0)
    if into is None:
        # Token-major whatever B is: the kernels make the N values of a token together.
        rows = (batch, groups, tokens, state)
        into = tuple(x.new_empty(rows).transpose(2, 3) for x in (B, C))
    return (
        _dense(u.shape, u),
        _dense(delta.shape, delta),
        torch.empty_like(A, memory_format=torch.contiguous_format),
        *into,
        none if D is None else D.new_empty(D.shape),
        none.clone() if z is None else _dense(z.shape, z),
        none.clone() if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def _backward(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, order, states, softplus, reverse, gradients,
    chunk, into=None,
):  # fmt: skip
    """Launch the backward kernels; ``states`` are those that the forward pass left.

    ``into`` are places for dB and dC, (B, 1, N, L) with the N values of a token side by side and
    sequences that follow one another, such as columns of the gradient of a projection.
    """
    from . import triton_kernels as kernels

    grads = _gradients_like(u, delta, A, B, C, D, z, delta_bias, into)
    du, ddelta, dA, dB, dC, dD, dz, dbias = grads
    batch, groups, heads, tokens = u.shape
    channels, state = A.shape
    length = _length(u, order)
    if u.numel() == 0 or length == 0:
        for grad in grads:
            grad.zero_()
        return grads
    u, delta, z, dout = _lanes(u), _lanes(delta), _lanes(z), _lanes(dout)
    plan = _plan(u, state, length, gradients, chunk)
    block = plan.backward.block
    n_blocks = -(-heads // block)
    dlast = None if dlast is None else dlast.contiguous()
    chunked = plan.n_chunks > 1
    scratch = A.new_empty(batch, -(-length // RUN), state, channels)
    places = -(-length // RUN) * RUN
    dbc = A.new_empty(2, n_blocks, batch, groups, places, state)
    dchannel = A.new_empty(batch * plan.n_chunks, state + 2, channels)
    gstates = A.new_empty(batch, plan.n_chunks, state, channels)

    shared = dict(
        p_delta=delta,
        p_A=A,
        p_C=C,
        p_z=z,
        p_bias=delta_bias,
        p_order=order,
        p_dout=dout,
        **_strides('delta', delta, 'bgdl'),
        **_strides('C', C, 'bgnl'),
        **_strides('z', z, 'bgdl'),
        **_strides('dout', dout, 'bgdl'),
        order_sg=_order_step(order),
        heads=heads,
        groups=groups,
        length=length,
        chunk=plan.chunk,
        n_chunks=plan.n_chunks,
        n_blocks=n_blocks,
        N=state,
        BLOCK=block,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        SOFTPLUS=softplus,
        ORDER=order is not None,
        REVERSE=reverse,
        EVEN=heads % block == 0,
        num_warps=1,
    )
    grid = (batch * plan.n_chunks * groups * n_blocks,)
    with torch.cuda.device_of(u):
        if chunked:
            sums = A.new_empty(batch, plan.n_chunks, channels)
            kernels.scan_backward_aggregate_kernel[grid](
                p_state=gstates, p_sum=sums, UNROLL=plan.backward.unroll, **shared
            )
            _carry(kernels, gstates, sums, A, dlast, backward=True)
        kernels.scan_backward_kernel[grid](
            p_u=u,
            p_B=B,
            p_D=D,
            p_state=states,
            p_gstate=gstates,
            p_dlast=dlast,
            p_scratch=scratch,
            p_du=du,
            p_ddelta=ddelta,
            p_dz=None if z is None else dz,
            p_dbc=dbc,
            p_dchannel=dchannel,
            **_strides('u', u, 'bgdl'),
            **_strides('B', B, 'bgnl'),
            **_strides('du', du, 'bgdl'),
            **_strides('ddelta', ddelta, 'bgdl'),
            **_strides('dz', None if z is None else dz, 'bgdl'),
            batch=batch,
            K=RUN,
            CHUNKED=chunked,
            HAS_DLAST=dlast is not None,
            HAS_D=D is not None,
            **shared,
        )
        kernels.sum_over_blocks_kernel[(-(-length * state // 256) * batch * groups, 2)](
            p_dbc=dbc,
            p_dB=dB,
            p_dC=dC,
            p_order=order,
            order_sg=_order_step(order),
            batch=batch,
            groups=groups,
            length=length,
            tokens=tokens,
            n_blocks=n_blocks,
            row=dB.stride(3),
            N=state,
            K=RUN,
            COLS=256,
            ORDER=order is not None,
            REVERSE=reverse,
        )
        kernels.sum_over_chunks_kernel[(-(-channels // 32), state + 2)](
            p_dchannel=dchannel,
            p_dA=dA,
            p_dD=None if D is None else dD,
            p_dbias=None if delta_bias is None else dbias,
            channels=channels,
            rows=batch * plan.n_chunks,
            state=state,
            ROWS=32,
            COLS=32,
            HAS_D=D is not None,
            HAS_BIAS=delta_bias is not None,
        )
    return grads


# The operators. u, delta and z are (B, G, H, L) with any strides, so that directions may share a
# tensor through a stride of zero; B and C are (B, G, N, L); order is int32 (1, L') or (G, L').

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, Tensor? order'
)
_FLAGS = 'bool softplus, bool reverse, bool gradients, int chunk'
_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_library.define(
    f'selective_scan_triton({_INPUTS}, {_FLAGS}) -> (Tensor out, Tensor last, Tensor states)'
)
_library.define(
    f'selective_scan_triton_backward(Tensor dout, Tensor? dlast, {_INPUTS}, Tensor states, '
    f'{_FLAGS}) -> ({", ".join(["Tensor"] * 8)})'
)
_library.define(
    f'selective_scan_triton_into(Tensor(a!) into, {_INPUTS}, {_FLAGS}) -> Tensor last'
)


def _forward_into(into, *inputs):
    return _forward(*inputs, out=into)[1]


for _device in ('CPU', 'CUDA', 'XPU'):
    _library.impl('selective_scan_triton', _forward, _device)
    _library.impl('selective_scan_triton_into', _forward_into, _device)
    _library.impl('selective_scan_triton_backward', _backward, _device)


@torch.library.register_fake('mmhybrid::selective_scan_triton', lib=_library)
def _forward_fake(
    u, delta, A, B, C, D, z, delta_bias, order, softplus, reverse, gradients, chunk
):
    batch = u.shape[0]
    return (
        _dense(u.shape, u),
        A.new_empty(batch, *A.shape),
        A.new_empty(_state_shape(u, A, order, gradients, chunk)),
    )


@torch.library.register_fake('mmhybrid::selective_scan_triton_into', lib=_library)
def _forward_into_fake(into, u, delta, A, *_):
    return A.new_empty(u.shape[0], *A.shape)


@torch.library.register_fake('mmhybrid::selective_scan_triton_backward', lib=_library)
def _backward_fake(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, order, states, softplus, reverse, gradients,
    chunk,
):  # fmt: skip
    return _gradients_like(u, delta, A, B, C, D, z, delta_bias)


def _setup_context(ctx, inputs, output):
    *tensors, softplus, reverse, gradients, chunk = inputs
    ctx.flags = softplus, reverse, gradients, chunk
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlast, _):
    *tensors, states = ctx.saved_tensors
    if dout is None:
        if dlast is None:
            return (None,) * 13
        dout = torch.zeros_like(tensors[0])
    grads = torch.ops.mmhybrid.selective_scan_triton_backward(
        dout, dlast, *tensors, states, *ctx.flags
    )
    present = [g if x is not None else None for g, x in zip(grads, tensors[:8], strict=True)]
    return (*present, *(None,) * 5)


def _no_second_derivative(*_):
    raise RuntimeError(
        'selective_scan with the Triton backend has a first derivative only, and a second one was '
        "asked for (create_graph=True); use selective_scan(..., backend='reference')."
    )


torch.library.register_autograd(
    'mmhybrid::selective_scan_triton', _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    'mmhybrid::selective_scan_triton_backward', _no_second_derivative, lib=_library
)


def scan_grouped(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """The Triton scan of (B, G, H, L) tensors: y like u, and the last state (B, D, N).

    ``order`` is an int32 table of tokens, see README.md; ``chunk`` overrides the number of tokens
    per program. Nothing is checked.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    gradients = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    flags = (delta_softplus, reverse, gradients, chunk)
    if A.shape[1] <= MAX_STATE:
        y, last, _ = torch.ops.mmhybrid.selective_scan_triton(
            u, delta, A, B, C, D, z, delta_bias, order, *flags
        )
        return y, last
    # The output is a sum over states, so parts of a large N are scanned apart and added in float32.
    total, lasts = None, []
    for n in range(0, A.shape[1], MAX_STATE):
        part = slice(n, n + MAX_STATE)
        y, last, _ = torch.ops.mmhybrid.selective_scan_triton(
            u.float(), delta, A[:, part].contiguous(), B[:, :, part], C[:, :, part],
            D if n == 0 else None, None, delta_bias, order, *flags,
        )  # fmt: skip
        total = y if total is None else total + y
        lasts.append(last)
    if z is not None:
        total = total * torch.nn.functional.silu(z.float())
    return total.to(u.dtype), torch.cat(lasts, dim=2)


def scan_into(
    into: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    order: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Write y into a view of u's shape (B, G, H, L), such as half of a concat buffer.

    For code that needs no gradient or supplies its own: autograd does not see the write. Arguments
    as in :func:`selective_scan_ordered`, with float32 parameters and N up to ``MAX_STATE``.

    Returns:
        The last state, (B, D, N).

    Raises:
        ValueError: ``into`` has another shape, or N is too large.
    """
    if into.shape != u.shape:
        raise ValueError(
            f'scan_into expects a view like u, {tuple(u.shape)}, to write into, '
            f'got {tuple(into.shape)}.'
        )
    if A.shape[1] > MAX_STATE:
        raise ValueError(f'scan_into takes at most {MAX_STATE} states, got N = {A.shape[1]}.')
    return torch.ops.mmhybrid.selective_scan_triton_into(
        into, u, delta, A, B, C, D, z, delta_bias, order, delta_softplus, reverse, False, 0
    )


def selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    """The backend of :func:`mmhybrid.ops.selective_scan`: y (B, D, L), last state (B, D, N)."""
    groups = B.shape[1]
    u, delta, z = (
        x if x is None else x.unflatten(1, (groups, x.shape[1] // groups))
        for x in (u, delta, z)
    )
    A, D, delta_bias = (x if x is None else x.contiguous() for x in (A, D, delta_bias))
    y, last = scan_grouped(u, delta, A, B, C, D, z, delta_bias, None, delta_softplus, reverse)
    return y.flatten(1, 2), last
