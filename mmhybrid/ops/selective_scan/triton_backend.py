"""The Triton backend of the selective scan: its calls and PyTorch operators.

B batch, G groups, H channels per group, D = G H, L tokens, N state, NC chunks. Importing this
file needs no Triton; the kernels are imported when they are first used.
"""

import functools
import math

import torch
from torch import Tensor

from .. import library
from . import launch, passes
from .launch import Prepared, describe, intercepted
from .passes import state_major, token_major

__all__ = ['prepared', 'scan', 'scan_grouped', 'selective_scan_triton']

#: States that one kernel keeps in registers; a larger N is computed in parts of this size.
MAX_STATE = 16


_CALLS: dict[tuple, '_Call'] = {}

#: See :func:`.launch.prepared`; of u, delta, A, B, C, D, z, delta_bias and the order.
prepared = functools.partial(launch.prepared, _CALLS)


class _Call:
    """One kind of call: its forward pass, and its backward passes by what reaches them."""

    def __init__(self, tensors, softplus, reverse, gradients, chunk, last):
        self.flags = softplus, reverse, gradients, chunk
        self.forward = passes.Forward(tensors, None, *self.flags, last=last)
        self.backward: dict[tuple, passes.Backward] = {}
        self.gradients = gradients
        self.last = last

    def __call__(self, tensors, pointers):
        """y, or y and the last state."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        y, last, _ = self.forward.run(tensors, pointers)
        return (y, last) if self.last else y


class _Scan(torch.autograd.Function):
    """The scan where nothing looks into it: an operator's way through the dispatcher costs more
    than the rest of a call."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        y, last, work = call.forward.run(tensors, pointers)
        ctx.save_for_backward(*tensors, work)
        ctx.call = call
        if call.last:
            ctx.set_materialize_grads(False)
            return y, last
        return y

    @staticmethod
    def backward(ctx, dout, dlast=None):
        call = ctx.call
        if dout is None and dlast is None:
            return (None,) * 11
        *inputs, work = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        if dlast is not None:
            dlast = dlast.contiguous()
        tensors = (*inputs, dout, dlast, work)
        found = None if torch.is_grad_enabled() or intercepted() else describe(tensors)
        if found is None:
            return None, None, *_backward_operator(call, *tensors), None
        pointers, description = found
        key = tuple(description)
        one = call.backward.get(key)
        if one is None:
            one = passes.Backward(tensors, (None,) * 8, *call.flags)
            passes.remember(call.backward, key, one)
        return None, None, *one.run(tensors, pointers), None


_apply = launch.fast_apply(_Scan)


def _backward_operator(call: _Call, *tensors):
    """The backward pass as an operator, which says no to a second derivative."""
    *inputs, dout, dlast, work = tensors
    groups = call.forward.shape.groups
    apart = (_apart(x, groups) if i in (0, 1, 6) else x for i, x in enumerate(inputs[:8]))
    u, delta, A, B, C, *rest = apart
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    shape = call.forward.shape.states
    states = work[: math.prod(shape)].view(shape)
    grads = torch.ops.mmhybrid.selective_scan_triton_backward(
        _apart(dout, groups), dlast, u, delta, A, B, C, *rest, inputs[8], states, *call.flags
    )
    return [
        None if x is None else grad.reshape(x.shape)
        for x, grad in zip(inputs[:8], grads, strict=True)
    ]


def _apart(x: Tensor | None, groups: int) -> Tensor | None:
    """(B, D, L) as (B, G, H, L)."""
    if x is None or x.dim() == 4:
        return x
    return x.unflatten(1, (groups, x.shape[1] // groups))


def takes(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call of these tensors needs nothing done to them before the kernels."""
    u, _, A, _, _, D, _, bias, order = tensors
    parameters = (A, D, bias)
    length = u.shape[-1] if order is None else order.shape[-1]
    return (
        u.numel() > 0
        and length > 0
        and A.shape[1] <= MAX_STATE
        and all(
            x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in parameters
        )
        and (order is None or (order.dtype == torch.int32 and order.is_contiguous()))
    )


def scan(
    ready: Prepared, softplus: bool, reverse: bool, last: bool, chunk: int = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or y and the last state, of a prepared call that the kernels take; remembers its kind.

    Nothing is checked.
    """
    gradients = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in ready.tensors
    )
    call = _Call(ready.tensors, softplus, reverse, gradients, chunk, last)
    passes.remember(_CALLS, ready.key, call)
    return call(ready.tensors, ready.pointers)


def forget() -> None:
    """Work every call out again, for tests that change how."""
    _CALLS.clear()
    passes.forget()


# The operators. u, delta and z are (B, G, H, L) with any strides, so that directions may share a
# tensor through a stride of zero; B and C are (B, G, N, L); order is int32 (1, L') or (G, L').

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, Tensor? order'
)
_FLAGS = 'bool softplus, bool reverse, bool gradients, int chunk'
def _forward(*arguments):
    inputs, flags = arguments[:9], arguments[9:]
    u, order = inputs[0], inputs[8]
    if u.numel() == 0 or (order is not None and order.shape[-1] == 0):
        y, last, states = _forward_fake(*arguments)
        return y, last.zero_(), states
    return passes.forward(inputs, *flags)


def _backward(dout, dlast, *arguments):
    inputs, states, flags = arguments[:9], arguments[9], arguments[10:]
    grads = _gradients_like(*inputs[:8])
    if dout.numel() == 0 or (inputs[8] is not None and inputs[8].shape[-1] == 0):
        for grad in grads:
            grad.zero_()
        return grads
    given = [None if x is None else grad for x, grad in zip(inputs[:8], grads, strict=True)]
    dlast = None if dlast is None else dlast.contiguous()
    passes.backward(dout, dlast, inputs, states, *flags, given)
    return grads


def _dense(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised (B, ..., channels, L) whose channels are neighbours in memory."""
    return like.new_empty_strided(shape, token_major(shape))


def _gradients_like(u, delta, A, B, C, D, z, delta_bias):
    """Uninitialised gradients in the layouts that the kernels write; absent ones are empty."""
    none = A.new_empty(0)
    return (
        _dense(u.shape, u),
        _dense(delta.shape, delta),
        torch.empty_like(A, memory_format=torch.contiguous_format),
        # Token-major whatever B is: the kernels make the N values of a token together.
        *(x.new_empty_strided(x.shape, state_major(x.shape)) for x in (B, C)),
        none if D is None else D.new_empty(D.shape),
        none.clone() if z is None else _dense(z.shape, z),
        none.clone() if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def _forward_fake(
    u, delta, A, B, C, D, z, delta_bias, order, softplus, reverse, gradients, chunk
):
    batch = u.shape[0]
    return (
        _dense(u.shape, u),
        A.new_empty(batch, *A.shape),
        A.new_empty(passes.state_shape(u, A, B, order, gradients, chunk)),
    )


def _backward_fake(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, order, states, softplus, reverse, gradients,
    chunk,
):
    return _gradients_like(u, delta, A, B, C, D, z, delta_bias)


def _setup_context(ctx, inputs, output):
    *tensors, softplus, reverse, gradients, chunk = inputs
    ctx.flags = softplus, reverse, gradients, chunk
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlast, _):
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


library.register(
    'selective_scan_triton',
    schema=f'({_INPUTS}, {_FLAGS}) -> (Tensor out, Tensor last_state, Tensor chunk_states)',
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        f'(Tensor dout, Tensor? dlast, {_INPUTS}, Tensor chunk_states, {_FLAGS}) -> '
        f'({", ".join(["Tensor"] * 8)})'
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'selective_scan with the Triton backend has a first derivative only, and a second one was '
        "asked for (create_graph=True); use selective_scan(..., backend='reference')."
    ),
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
    tensors = (u, delta, A, B, C, D, z, delta_bias, order)
    flags = delta_softplus, reverse
    if A.shape[1] <= MAX_STATE:
        ready = prepared(tensors, 'grouped', *flags, chunk) if takes(tensors) else None
        if ready is not None:
            if ready.call is not None:
                return ready.call(tensors, ready.pointers)
            return scan(ready, *flags, True, chunk)
        gradients = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in tensors
        )
        return torch.ops.mmhybrid.selective_scan_triton(*tensors, *flags, gradients, chunk)[:2]
    # The output is a sum over states, so parts of a large N are scanned apart and added in float32.
    total, lasts = None, []
    for n in range(0, A.shape[1], MAX_STATE):
        part = slice(n, n + MAX_STATE)
        y, last = scan_grouped(
            u.float(), delta, A[:, part].contiguous(), B[:, :, part], C[:, :, part],
            D if n == 0 else None, None, delta_bias, order, *flags, chunk,
        )
        total = y if total is None else total + y
        lasts.append(last)
    if z is not None:
        total = total * torch.nn.functional.silu(z.float())
    return total.to(u.dtype), torch.cat(lasts, dim=2)


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
