"""The selective scan in a few large PyTorch operations: any device, no compiler.

B batch, D channels, L tokens, N state, G groups, H = D / G channels per group.

The tokens are cut into K chunks of T tokens that advance side by side, so that a step costs one
operation for K tokens. Two sweeps: the first finds what each chunk leaves when it starts from
zero, a short loop over the chunks turns that into every chunk's initial state, and the second sweep
computes the states. Long sequences are cut into blocks of K * T tokens first, which bounds the
temporary memory. Packed tensors are (blocks, T, K, B, ...) and states (..., B, G, N, H): channels
last, so that every operation runs over contiguous memory. README.md has the mathematics.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import apply_gate, gate_gradients, make_operator

# State values that one elementwise operation should cover; with fewer, the call itself dominates.
_WIDTH = 48 * 1024
# State values per block: the handful of temporaries of this size should stay near the caches.
_BLOCK = 512 * 1024


class Plan(NamedTuple):
    """How the tokens are cut: ``blocks`` * ``steps`` * ``chunks`` >= L."""

    blocks: int
    steps: int
    chunks: int


@functools.lru_cache(maxsize=256)
def make_plan(length: int, width: int) -> Plan:
    """Choose the cut for L tokens of ``width`` = B * D * N state values each."""
    most = max(1, min(length, _BLOCK // width))  # tokens per block
    # A block costs about 2 * T + K operations for its K * T tokens: least at K = sqrt(2 * K * T).
    chunks = min(round((2 * most) ** 0.5), _WIDTH // width)
    if chunks < 6:  # two sweeps over chunks would cost more than one over the tokens
        shapes = [(steps, 1) for steps in range(most // 2 + 1, most + 1)]
    else:
        shapes = [(steps, k) for k in range(chunks // 2, chunks + 1)
                  for steps in range(most // (2 * k) + 1, -(-most // k) + 1)]

    def cost(shape):
        steps, k = shape
        blocks = -(-length // (steps * k))
        padded = blocks * steps * k - length
        # In operations; padding means that every input is copied once more.
        return blocks * (2 * steps + k + 16) * (1.1 if padded else 1.0)

    steps, chunks = min(shapes, key=cost)
    return Plan(-(-length // (chunks * steps)), steps, chunks)


def _plan_for(u: Tensor, A: Tensor) -> Plan:
    return make_plan(int(u.shape[2]), int(u.shape[0] * A.numel()))


def _pack(x: Tensor, plan: Plan, dtype: torch.dtype, reverse: bool) -> Tensor:
    """Copy (B, ..., L) to (blocks, T, K, B, ...) in scan order, padded with zeros.

    A padded token has delta = 0, hence it keeps the state and adds nothing to it.
    """
    if reverse:
        x = x.flip(-1)
    padding = plan.blocks * plan.chunks * plan.steps - x.shape[-1]
    if padding:
        x = F.pad(x, (0, padding))
    x = x.unflatten(-1, (plan.blocks, plan.chunks, plan.steps))
    x = x.permute(-3, -1, -2, *range(x.dim() - 3))
    return x.to(dtype).contiguous()


def _unpack(x: Tensor, length: int, reverse: bool) -> Tensor:
    """Undo `_pack`: (blocks, T, K, B, ...) to (B, ..., L)."""
    x = x.permute(*range(3, x.dim()), 0, 2, 1).flatten(-3)[..., :length]
    return x.flip(-1) if reverse else x


def _step(delta: Tensor, delta_bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Give the discretisation step (B, D, L)."""
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return F.softplus(delta) if softplus else delta


def _sweep(start: Tensor, decays: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
    """Turn each gain into the state after it, in place: h = decay * h + gain."""
    for decay, gain in zip(decays, gains, strict=True):
        start = gain.addcmul_(decay, start)


def _sweep_end(start: Tensor, decays: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """Give only the state after the last gain, and leave the gains as they are."""
    end = torch.empty_like(start)
    for decay, gain in zip(decays, gains, strict=True):
        start = torch.addcmul(gain, decay, start, out=end)
    return start


def _fill_chunk_states(
    rows: Sequence[Tensor], totals: Sequence[Tensor], ends: Sequence[Tensor]
) -> None:
    """Fill in rows[1:], the initial states of the chunks that follow; rows[0] is given.

    ``totals`` are the chunks' whole decays, ``ends`` what they leave when they start from zero.
    """
    for row, following, total, end in zip(rows, rows[1:], totals, ends, strict=False):
        torch.addcmul(end, total, row, out=following)


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Batched matrix product over all but the last two axes."""
    torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=out.flatten(0, -3))


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    dtype = A.dtype
    plan = _plan_for(u, A)
    size = (batch, groups, state, channels // groups)

    def pack(x, *inner):
        return _pack(x, plan, dtype, reverse).unflatten(-1, inner)

    delta = pack(_step(delta, delta_bias, delta_softplus, dtype), groups, 1, -1)
    u_ = pack(u, groups, 1, -1)
    B = pack(B, state, 1)
    C = pack(C, 1, state)
    A = A.view(groups, -1, state).transpose(1, 2).contiguous()

    y = torch.empty_like(u_)
    # The final state is the last row.
    chunk_states = A.new_empty((plan.blocks * plan.chunks + 1, *size))
    chunk_states[0] = 0
    decay = A.new_empty((plan.steps, plan.chunks, *size))
    h = torch.empty_like(decay)
    decays, states = decay.unbind(), h.unbind()
    for i in range(plan.blocks):
        torch.mul(delta[i], A, out=decay).exp_()
        torch.mul(delta[i] * u_[i], B[i], out=h)
        rows = chunk_states[i * plan.chunks : (i + 1) * plan.chunks + 1]
        if plan.chunks > 1:
            ends = _sweep_end(h[0], decays[1:], states[1:])
            totals = torch.exp(delta[i].sum(0) * A)
            _fill_chunk_states(rows.unbind(), totals.unbind(), ends.unbind())
        _sweep(rows[:-1], decays, states)
        if plan.chunks == 1:
            rows[1] = h[-1, 0]
        _matmul(C[i], h, out=y[i])
    if D is not None:
        y.addcmul_(u_, D.view(groups, 1, -1))

    y = _unpack(y.flatten(-3), length, reverse)
    last_state = chunk_states[-1].transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    last_state = last_state.view(batch, channels, state)
    ungated = A.new_empty(0)
    if z is not None:
        ungated = y.contiguous()
        y = apply_gate(ungated, z)
    return y.to(u.dtype).contiguous(), last_state, chunk_states, ungated


def _backward(
    grad_y, grad_last_state, chunk_states, ungated,
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse,
):
    """Sweep the adjoint g of the state from the last token to the first.

    g_t = C_t * dy_t + decay_{t+1} * g_{t+1}; a chunk's states are computed again from its
    initial one.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    dtype = A.dtype
    plan = _plan_for(u, A)
    size = (batch, groups, state, channels // groups)
    grad_y = torch.zeros_like(u, dtype=dtype) if grad_y is None else grad_y.to(dtype)
    grad_z = None
    if z is not None:
        grad_y, grad_z = gate_gradients(grad_y, ungated, z)

    def pack(x, *inner):
        return _pack(x, plan, dtype, reverse).unflatten(-1, inner)

    step = _step(delta, delta_bias, delta_softplus, dtype)
    delta = pack(step, groups, 1, -1)
    u = pack(u, groups, 1, -1)
    grad_y = pack(grad_y, groups, 1, -1)
    B = pack(B, 1, state)
    C = pack(C, state, 1)
    A = A.view(groups, -1, state).transpose(1, 2).contiguous()
    B_column = B.transpose(-1, -2)

    decay = A.new_empty((plan.steps, plan.chunks, *size))
    h, g = torch.empty_like(decay), torch.empty_like(decay)
    incoming = A.new_empty((plan.chunks + 1, *size))  # of the chunks, and of the next block's last
    first, last = incoming[0], incoming[-1]
    grad_input = torch.empty_like(u)  # of delta * u
    grad_delta = torch.empty_like(u)
    grad_B, grad_C = torch.empty_like(B_column), torch.empty_like(C)
    grad_A = torch.zeros_like(A)
    last.zero_()
    if grad_last_state is not None:
        last += grad_last_state.view(batch, groups, -1, state).transpose(-1, -2)
    decays, states, adjoints = decay.unbind(), h.unbind(), g.unbind()
    backwards, decays_after = adjoints[-2::-1], decays[:0:-1]
    for i in reversed(range(plan.blocks)):
        torch.mul(delta[i], A, out=decay).exp_()
        gain = delta[i] * u[i]
        torch.mul(gain, B_column[i], out=h)
        start = chunk_states[i * plan.chunks : (i + 1) * plan.chunks]
        _sweep(start, decays, states)
        torch.mul(grad_y[i], C[i], out=g)
        if plan.chunks > 1:
            ends = _sweep_end(g[-1], decays_after, backwards) * decay[0]
            totals = torch.exp(delta[i].sum(0) * A)
            _fill_chunk_states(*(x.unbind()[::-1] for x in (incoming, totals, ends)))
        g[-1].add_(incoming[1:])
        _sweep(g[-1], decays_after, backwards)
        if plan.chunks == 1:
            torch.mul(decay[0, 0], g[0, 0], out=first)
        last.copy_(first)

        _matmul(h, grad_y[i].transpose(-1, -2), out=grad_C[i])
        _matmul(g, gain.transpose(-1, -2), out=grad_B[i])
        _matmul(B[i], g, out=grad_input[i])
        # The gradient of delta * A is g_t * decay_t * h_{t-1}.
        decay.mul_(g)
        decay[1:].mul_(h[:-1])
        decay[0].mul_(start)
        torch.sum(torch.mul(decay, A, out=h), -2, keepdim=True, out=grad_delta[i])
        grad_A += torch.mul(decay, delta[i], out=h).sum((0, 1, 2))

    grad_delta.addcmul_(grad_input, u)
    grad_u = grad_input.mul_(delta)
    grad_D = grad_bias = None
    if D is not None:
        grad_u.addcmul_(grad_y, D.view(groups, 1, -1))
        grad_D = (grad_y * u).sum((0, 1, 2, 3)).flatten()
    grad_delta = _unpack(grad_delta.flatten(-3), length, reverse)
    if delta_softplus:  # its derivative, a sigmoid, written with its value
        grad_delta = grad_delta * -torch.expm1(-step)
    if delta_bias is not None:
        grad_bias = grad_delta.sum((0, 2))
    grads = (
        _unpack(grad_u.flatten(-3), length, reverse),
        grad_delta,
        grad_A.transpose(-1, -2).reshape(channels, state),
        _unpack(grad_B.squeeze(-1), length, reverse),
        _unpack(grad_C.squeeze(-1), length, reverse),
        grad_D,
        grad_z,
        grad_bias,
    )
    return tuple(
        A.new_empty(0) if x is None else grad.to(x.dtype).contiguous()
        for x, grad in zip(inputs, grads, strict=True)
    )


def _chunk_states_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    plan = _plan_for(u, A)
    groups, state = B.shape[1:3]
    rows = plan.blocks * plan.chunks + 1
    return rows, u.shape[0], groups, state, u.shape[1] // groups


selective_scan_torch = make_operator(
    'selective_scan_torch', _forward, _backward, _chunk_states_shape
)
