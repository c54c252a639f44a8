"""The selective scan in any order of the tokens: through a table, without reordered copies.

B batch, G groups, H channels per group, D = G H, L tokens, L' positions of the sequence, N state.
"""

import torch
from torch import Tensor

from ..reorder import inverse_of, reorder
from . import _wish_of_environment, choose_backend, cpp, run_backend, triton_backend
from .operator import apply_gate

__all__ = ['reads_tables', 'selective_scan_ordered']


def reads_tables(backend: str) -> bool:
    """Whether a backend's tensors stay row-major on a GPU, where the other kernels are ours too."""
    return backend == 'triton'


def selective_scan_ordered(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    order: Tensor,
    reverse: bool = False,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan that visits token ``order[p]`` at position p and leaves every y at its token.

    The Triton and the compiled CPU kernels read and write through the table; other backends get
    reordered copies.

    Args:
        u: input, (B, G, H, L), any strides: directions that share a map may share it through
            ``expand`` over G.
        delta: step, (B, G, H, L).
        A: decay rates, (G * H, N).
        B: input weights, (B, G, N, L).
        C: output weights, (B, G, N, L).
        D: skip weights, (G * H,).
        z: gate, (B, G, H, L).
        delta_bias: added to delta, (G * H,).
        delta_softplus: pass delta (after its bias) through softplus.
        return_last_state: also return the state.
        order: int32 or int64, (L',) for all groups or (G, L') for one sequence each. Every token
            appears once in a row; where L' > L, -1 stands for a zero token (zeros in u, delta, B, C
            and z), as in windows that overhang the map. The values are not checked.
        reverse: visit the positions from right to left.
        backend: see :func:`mmhybrid.ops.selective_scan`.

    Returns:
        y (B, G, H, L) in u's dtype; with ``return_last_state`` also the state after the last
        position, (B, G * H, N). Both are differentiable, once, in every floating input.

    Raises:
        TypeError: the order is no integer tensor.
        ValueError: shapes or devices do not fit together.
        RuntimeError: the backend that was asked for cannot be used.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, order)
    flags = bool(delta_softplus), bool(reverse), bool(return_last_state)
    wish = _wish_of_environment() if backend == 'auto' else backend
    ready = triton_backend.prepared(tensors, 'ordered', wish, *flags)
    if ready is not None and ready.call is not None:  # has passed all of the below
        return ready.call(tensors, ready.pointers)

    _check(u, delta, A, B, C, D, z, delta_bias, order)
    dtype = torch.float32
    for x in (u, delta, A, B, C, D, z, delta_bias):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    name = choose_backend(backend, u.device, dtype, A.shape[1])
    ours = name == 'triton' and order.dim() == 2
    if ready is not None and ours and triton_backend.takes(tensors):
        return triton_backend.scan(ready, *flags)
    order = order.reshape(-1, order.shape[-1])
    if name == 'triton' and u.numel():
        A, D, delta_bias = (
            x if x is None else x.to(dtype).contiguous() for x in (A, D, delta_bias)
        )
        order = order.int().contiguous()
        found = triton_backend.scan_grouped(u, delta, A, B, C, D, z, delta_bias, order, *flags[:2])
    elif name == 'cpp' and u.numel():
        found = _scan_compiled(u, delta, A, B, C, D, z, delta_bias, order, *flags[:2])
    else:
        found = _scan_copies(name, dtype, *tensors[:8], order, *flags[:2])
    return found if return_last_state else found[0]


def _scan_compiled(u, delta, A, B, C, D, z, delta_bias, order, delta_softplus, reverse):
    order = (order.flip(-1) if reverse else order).int().contiguous()
    y, last_state = cpp.scan_ordered(
        u, delta, None, A, B, C, D, delta_bias, order, delta_softplus, False
    )
    y = y if z is None else apply_gate(y, z)
    return y.to(u.dtype), last_state


def _scan_copies(
    name, dtype, u, delta, A, B, C, D, z, delta_bias, order, delta_softplus, reverse
):
    """Tokens are reordered before the scan, and y is put back after it."""
    groups, group_dim, tokens = u.shape[1:]
    inverse = inverse_of(order, tokens)

    def take(x):
        return None if x is None else reorder(x, order, inverse, True, False)

    def flat(x):
        return None if x is None else x.flatten(1, 2)

    y, last_state = run_backend(
        name, dtype, flat(take(u)), flat(take(delta)), A, take(B), take(C), D, flat(take(z)),
        delta_bias, delta_softplus, reverse,
    )
    return reorder(y.unflatten(1, (groups, group_dim)), inverse, order, False, True), last_state


def _check(u, delta, A, B, C, D, z, delta_bias, order) -> None:
    if u.dim() != 4:
        raise ValueError(
            f'selective_scan_ordered expects u of shape (B, G, H, L), got {tuple(u.shape)}; '
            'use u.unflatten(1, (G, H)) for the groups of B and C.'
        )
    for name, x in (('delta', delta), ('z', z)):
        if x is not None and x.shape != u.shape:
            raise ValueError(
                f'selective_scan_ordered expects {name} like u, {tuple(u.shape)}, '
                f'got {tuple(x.shape)}.'
            )
    if B.dim() != 4 or B.shape[1] != u.shape[1]:
        raise ValueError(
            f'selective_scan_ordered expects B of shape (B, G, N, L) with G = {u.shape[1]}, '
            f'got {tuple(B.shape)}.'
        )
    # Kernels take addresses from these sizes, so nothing else would notice.
    batch, groups, group_dim, tokens = u.shape
    channels, state = groups * group_dim, B.shape[2]
    for name, x, shape in (
        ('B', B, (batch, groups, state, tokens)), ('C', C, (batch, groups, state, tokens)),
        ('A', A, (channels, state)), ('D', D, (channels,)), ('delta_bias', delta_bias, (channels,)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(
                f'selective_scan_ordered expects {name} of shape {shape} with u of shape '
                f'{tuple(u.shape)} and B of shape {tuple(B.shape)}, got {tuple(x.shape)}.'
            )
    if state == 0:
        raise ValueError(
            f'selective_scan_ordered expects B of shape (B, G, N, L) with N >= 1, '
            f'got {tuple(B.shape)}.'
        )
    for name, x in (('u', u), ('delta', delta), ('A', A), ('B', B), ('C', C), ('D', D), ('z', z),
                    ('delta_bias', delta_bias)):
        if x is not None and not x.is_floating_point():
            raise TypeError(
                f'selective_scan_ordered expects {name} of a real floating dtype, got {x.dtype}.'
            )
        if x is not None and x.device != u.device:
            raise ValueError(
                f'selective_scan_ordered expects {name} on {u.device} like u, got {x.device}.'
            )
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f'selective_scan_ordered expects order of dtype int32 or int64, got {order.dtype}.'
        )
    rows = order.shape[0] if order.dim() == 2 else 1
    if order.dim() not in (1, 2) or rows not in (1, u.shape[1]) or order.shape[-1] < u.shape[-1]:
        raise ValueError(
            f"selective_scan_ordered expects order of shape (L',) or (G, L') with "
            f"G = {u.shape[1]} and L' >= L = {u.shape[-1]}, got {tuple(order.shape)}."
        )
    if order.device != u.device:
        raise ValueError(
            f'selective_scan_ordered expects order on {u.device} like u, got {order.device}.'
        )
