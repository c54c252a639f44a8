"""Wraps a pair of forward and backward functions into a `torch.library` operator.

One wrapper for all backends, so that they share what autograd saves, how a second derivative is
refused, and how the operator looks to FakeTensor and `torch.compile`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, bool delta_softplus, bool reverse'
)
_FORWARD = f'({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)'
_BACKWARD = (
    f'(Tensor? grad_y, Tensor? grad_last_state, Tensor starts, Tensor ungated, {_INPUTS}) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'
)


def apply_gate(y: Tensor, z: Tensor) -> Tensor:
    """y * silu(z) in y's dtype."""
    return y * torch.nn.functional.silu(z.to(y.dtype))


def gate_gradients(grad: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the ungated y and of z, given that of `apply_gate`'s result."""
    z = z.to(grad.dtype)
    gate = torch.sigmoid(z)
    return grad * (gate * z), grad * ungated * (gate * (1 + z * (1 - gate)))


def make_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    starts_shape: Callable[[Tensor, Tensor, Tensor], tuple[int, ...]],
    device_types: str | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register ``mmhybrid::<name>`` and its backward; return the function that calls them.

    B and C are (B, G, N, L); A, D and delta_bias have the dtype of the state.

    Args:
        name: the operator's name.
        forward: of the inputs; gives y like u, the last state (B, D, N), the states at the chunk
            starts, and y before the gate (B, D, L) in the state's dtype (empty without z).
        backward: of the gradients of y and of the last state (None where nothing flows), chunk
            starts, ungated y and the inputs; gives the gradients of the eight tensors (empty for
            an absent D, z or delta_bias).
        starts_shape: of (u, A, B): the shape of the chunk starts.
        device_types: device on which the functions work, None for any.
    """

    def fake_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
        batch, channels, length = u.shape
        ungated = (batch, channels, length) if z is not None else (0,)
        return (
            u.new_empty((batch, channels, length)),
            A.new_empty((batch, channels, A.shape[1])),
            A.new_empty(starts_shape(u, A, B)),
            A.new_empty(ungated),
        )

    def fake_backward(grad_y, grad_last, starts, ungated, *inputs):
        tensors = inputs[:8]
        return tuple(
            inputs[2].new_empty((0,)) if x is None else x.new_empty(x.shape) for x in tensors
        )

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        _, _, starts, ungated = output
        ctx.save_for_backward(starts, ungated, *inputs[:8])
        ctx.flags = inputs[8:]

    def differentiate(ctx, grad_y, grad_last, *_):
        if grad_y is None and grad_last is None:
            return (None,) * 10
        starts, ungated, *inputs = ctx.saved_tensors
        grads = backward_op(grad_y, grad_last, starts, ungated, *inputs, *ctx.flags)
        kept = (None if x is None else grad for x, grad in zip(inputs, grads, strict=True))
        return (*kept, None, None)

    def refuse(ctx, *_):
        raise RuntimeError(
            'selective_scan can be differentiated only once: its backward pass has no derivative. '
            "Use backend='reference' for second derivatives, or drop create_graph=True."
        )

    def library_op(name, function, schema):
        return torch.library.custom_op(
            f'mmhybrid::{name}',
            function,
            mutates_args=(),
            device_types=device_types,
            schema=schema,
        )

    forward_op = library_op(name, forward, _FORWARD)
    forward_op.register_fake(fake_forward)
    backward_op = library_op(f'{name}_backward', backward, _BACKWARD)
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(differentiate, setup_context=setup_context)
    backward_op.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

    def run(*inputs):
        return forward_op(*inputs)[:2]

    return run
