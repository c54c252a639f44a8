"""What the backends share that are a pair of plain functions: one operator, and the gate.

The Triton backend has a schema of its own; `..library` registers both kinds.

B batch, D channels, L tokens, N state, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import library

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
    'Tensor? delta_bias, bool delta_softplus, bool reverse'
)
_FORWARD = f'({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)'
_BACKWARD = (
    f'(Tensor? grad_y, Tensor? grad_last_state, Tensor chunk_states, Tensor ungated, {_INPUTS}) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'
)
REFUSAL = (
    'selective_scan can be differentiated only once: its backward pass has no derivative. '
    "Use backend='reference' for second derivatives, or drop create_graph=True."
)
_ANY_DEVICE = ('CompositeExplicitAutograd',)


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
    chunk_states_shape: Callable[[Tensor, Tensor, Tensor], tuple[int, ...]],
    keys: tuple[str, ...] = _ANY_DEVICE,
    ungated_like: str = 'A',
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register ``mmhybrid::<name>`` and its backward; return the function that calls them.

    B and C are (B, G, N, L); A, D and delta_bias have the dtype of the state.

    Args:
        name: the operator's name.
        forward: of the inputs; gives y like u, the last state (B, D, N), the initial states of the
            chunks, and y before the gate (B, D, L) (empty without z).
        backward: of the gradients of y and of the last state (None where nothing flows), initial
            states of the chunks, ungated y and the inputs; gives the gradients of the eight tensors
            (empty for an absent D, z or delta_bias).
        chunk_states_shape: of (u, A, B): the shape of the initial states of the chunks.
        keys: dispatch keys of the devices on which the functions work.
        ungated_like: the ungated y has the dtype of 'A', the state's, or of 'u'.
    """

    def fake_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
        batch, channels, length = u.shape
        ungated = (batch, channels, length) if z is not None else (0,)
        return (
            u.new_empty((batch, channels, length)),
            A.new_empty((batch, channels, A.shape[1])),
            A.new_empty(chunk_states_shape(u, A, B)),
            dict(A=A, u=u)[ungated_like].new_empty(ungated),
        )

    def fake_backward(grad_y, grad_last_state, chunk_states, ungated, *inputs):
        tensors = inputs[:8]
        return tuple(
            inputs[2].new_empty((0,)) if x is None else x.new_empty(x.shape) for x in tensors
        )

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        _, _, chunk_states, ungated = output
        ctx.save_for_backward(chunk_states, ungated, *inputs[:8])
        ctx.flags = inputs[8:]

    def differentiate(ctx, grad_y, grad_last_state, *_):
        if grad_y is None and grad_last_state is None:
            return (None,) * 10
        chunk_states, ungated, *inputs = ctx.saved_tensors
        grads = backward_op(grad_y, grad_last_state, chunk_states, ungated, *inputs, *ctx.flags)
        kept = (None if x is None else grad for x, grad in zip(inputs, grads, strict=True))
        return (*kept, None, None)

    # A compiler traces the operators, not what they do.
    library.register(
        name,
        schema=_FORWARD,
        forward=torch.compiler.disable(forward),
        fake=fake_forward,
        setup_context=setup_context,
        differentiate=differentiate,
        backward_schema=_BACKWARD,
        backward=torch.compiler.disable(backward),
        backward_fake=fake_backward,
        refusal=REFUSAL,
        keys=keys,
    )
    forward_op, backward_op = (
        getattr(torch.ops.mmhybrid, part).default for part in (name, f'{name}_backward')
    )

    def run(*inputs):
        return forward_op(*inputs)[:2]

    return run
