"""The scan along walks with all that belongs to it: its calls and PyTorch operators.

B batch, K walks, E channels, L tokens, S steps of a walk, N state, R rank of the step, T taps.
Importing this file needs no Triton; the kernels are imported when first used.
"""

import torch
from torch import Tensor

from .. import library
from ..precision import autocast_off
from ..selective_scan import launch, triton_backend
from ..selective_scan.passes import find, remember
from .passes import Backward, Forward, number_of_states, sizes_of, split, states_of

__all__ = ['takes', 'walk_scan']


def walk_scan(
    uz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    w_x: Tensor,
    w_dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    slots: Tensor,
    steps: Tensor,
    factor: float | None = None,
) -> Tensor:
    """Gated selective scans of one row of tokens along K walks, on a GPU with Triton.

    Per walk: :func:`mmhybrid.ops.walk_conv.walk_conv`, a projection to step, B and C, another that
    expands the step, and the selective scan with a softplus. The gate is silu(z). Between the
    products and kernels nothing is copied, cast, split or summed on its own: both senses of a
    sequence take one launch each, and gradients are written where the next product reads them.

    Args:
        uz: (B, L, 2 E), contiguous: what is scanned, and the gate.
        conv_weight: (K, E, T).
        conv_bias: (K, E).
        w_x: (K, R + 2 N, E) in uz's dtype.
        w_dt: (K, E, R) in uz's dtype.
        dt_bias: (K * E,), float32.
        A: (K * E, N), float32, negative.
        D: (K * E,), float32.
        slots: int32 (K, S), see :func:`mmhybrid.ops.walk_conv.walk_conv`.
        steps: int32 (K, S), likewise.
        factor: of the sum of all walks, which needs S = L; None for each walk alone.

    Returns:
        With a factor (B, L, E), else (B, K, E, S) whose channels are neighbours; in uz's dtype.
        Differentiable once in every floating tensor. Nothing is checked but what :func:`takes`
        says.
    """
    tensors = (uz, conv_weight, conv_bias, w_x, w_dt, dt_bias, A, D, slots, steps)
    kind = uz.device.type
    autocast = not uz.is_meta and torch.is_autocast_enabled(kind)
    aside = autocast and torch.get_autocast_dtype(kind) != uz.dtype
    ready = launch.prepared(_CALLS, tensors, factor, aside)
    if ready is None:
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return torch.ops.mmhybrid.walk_scan(*tensors, factor, gradients)[0]
    call = ready.call
    if call is None:
        call = _Call(tensors, factor)
        remember(_CALLS, ready.key, call)
    if aside:
        with autocast_off(uz.device):
            return call(tensors, ready.pointers)
    return call(tensors, ready.pointers)


def takes(tokens: int, state: int) -> bool:
    """Whether there is an operation for this number of tokens of all images and of states."""
    return tokens > 0 and state <= triton_backend.MAX_STATE


_CALLS: dict[tuple, '_Call'] = {}
_FORWARD: dict[tuple, Forward] = {}
_BACKWARD: dict[tuple, Backward] = {}


def forget() -> None:
    """Work every call out again, for tests that change how."""
    for known in (_CALLS, _FORWARD, _BACKWARD):
        known.clear()


class _Call:
    """One kind of call: its forward pass, and its backward passes by what reaches them."""

    def __init__(self, tensors, factor: float | None):
        self.gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        self.factor = factor
        self.forward = Forward(tensors, factor, self.gradients)
        self.backward: dict[tuple, Backward] = {}

    def __call__(self, tensors, pointers) -> Tensor:
        """The output."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        return self.forward.run(tensors, pointers)[0]


class _WalkScan(torch.autograd.Function):
    """The operation where nothing looks into it."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        out, *kept = call.forward.run(tensors, pointers)
        ctx.save_for_backward(*tensors, *kept)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, dout):
        factor = ctx.call.factor
        if factor:
            dout = dout.contiguous()
        tensors = (*ctx.saved_tensors, dout)
        watched = torch.is_grad_enabled() or launch.intercepted()
        found = None if watched else launch.describe(tensors)
        if found is None:  # the operator says no to a second derivative
            return None, None, *_backward_operator(factor, *tensors), None, None
        pointers, description = found
        key = tuple(description)
        one = ctx.call.backward.get(key)
        if one is None:
            one = Backward(tensors, factor)
            remember(ctx.call.backward, key, one)
        if torch.is_autocast_enabled(dout.device.type):
            with autocast_off(dout.device):
                return None, None, *one.run(tensors, pointers), None, None
        return None, None, *one.run(tensors, pointers), None, None


_apply = launch.fast_apply(_WalkScan)


# The operators, where something looks into the operation.


def _backward_operator(factor, *tensors):
    """The backward pass as an operator."""
    *tensors, y, dout = tensors
    y = dout.new_empty(0) if y is None else y
    return torch.ops.mmhybrid.walk_scan_backward(*tensors, y, dout, factor)


def _forward(*arguments):
    *tensors, factor, gradients = arguments
    tensors = [x.contiguous() for x in tensors]
    with autocast_off(tensors[0].device):
        one, pointers = find(
            _FORWARD, tensors, (factor, gradients), lambda: Forward(tensors, factor, gradients)
        )
        out, x, delta, rows, states, y = one.run(tensors, pointers)
    kept = number_of_states(one.scan.shape.states)
    return out, x, delta, rows, states[:kept], out.new_empty(0) if y is None else y


def _backward(*arguments):
    *tensors, factor = arguments
    if factor:
        tensors[-1] = tensors[-1].contiguous()
    else:
        tensors[-2] = None
    # What an operator before this one left may lie in any way.
    tensors = [x if x is None or i == 15 else x.contiguous() for i, x in enumerate(tensors)]
    with autocast_off(tensors[0].device):
        one, pointers = find(_BACKWARD, tensors, (factor,), lambda: Backward(tensors, factor))
        grads = one.run(tensors, pointers)
    # Results of an operator share no memory, and lie as its fake says.
    return tuple(
        grad if grad._base is None and grad.is_contiguous() and grad.dtype == x.dtype
        else torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad)
        for grad, x in zip(grads, tensors[:8], strict=True)
    )


def _forward_fake(*arguments):
    *tensors, factor, gradients = arguments
    uz, conv_weight, _, _, w_dt, _, A, _, slots, _ = tensors
    sizes = sizes_of(uz, conv_weight, w_dt, A, slots)
    rows = sizes.walks, sizes.batch * sizes.steps
    x, delta = (uz.new_empty(*rows, sizes.channels) for _ in range(2))
    projected = uz.new_empty(*rows, sum(sizes.columns))
    y = uz.new_empty(sizes.batch, sizes.steps, sizes.walks, sizes.channels)
    y = y.permute(0, 2, 3, 1)
    b = split(projected, sizes)[1]
    shape = states_of(y, A, b, slots, gradients)
    states = A.new_empty(number_of_states(shape))
    if factor is None:
        return y, x, delta, projected, states, uz.new_empty(0)
    out = uz.new_empty(sizes.batch, sizes.tokens, sizes.channels)
    return out, x, delta, projected, states, y


def _backward_fake(*arguments):
    return tuple(x.new_empty(x.shape) for x in arguments[:8])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.factor, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, *_):
    if dout is None:
        return (None,) * 12
    grads = torch.ops.mmhybrid.walk_scan_backward(*ctx.saved_tensors, dout, ctx.factor)
    return (*grads, None, None, None, None)


_INPUTS = (
    'Tensor uz, Tensor conv_weight, Tensor conv_bias, Tensor w_x, Tensor w_dt, Tensor dt_bias, '
    'Tensor A, Tensor D, Tensor slots, Tensor steps'
)
_KEPT = 'Tensor x, Tensor delta, Tensor rows, Tensor states, Tensor y'
library.register(
    'walk_scan',
    schema=f'({_INPUTS}, float? factor, bool gradients) -> (Tensor out, {_KEPT})',
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        f'({_INPUTS}, {_KEPT}, Tensor dout, float? factor) -> ({", ".join(["Tensor"] * 8)})'
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'walk_scan has a first derivative only, and a second one was asked for '
        "(create_graph=True); build the model with scan_backend='reference'."
    ),
)
