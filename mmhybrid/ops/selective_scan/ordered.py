"""The selective scan in a named order of the tokens: through a table, without copies on a GPU.

B batch, G groups, H channels per group, D = G H, L tokens, L' places of the sequence, N state.
"""

import torch
from torch import Tensor

from . import _wish_of_environment, choose_backend, selective_scan, triton_backend

__all__ = ['reads_tables', 'selective_scan_ordered']


def reads_tables(fused: bool | str, backend: str) -> bool:
    """Whether a mixer's scan will read tokens through tables rather than from reordered copies.

    Args:
        fused: 'auto' where it can, False never, True to insist.
        backend: what :func:`choose_backend` has chosen.

    Raises:
        ValueError: for another value of ``fused``.
        RuntimeError: ``fused`` is True and the backend cannot.
    """
    if fused not in ('auto', True, False):
        raise ValueError(f"got fused={fused!r}, expected 'auto', True or False")
    if fused is True and backend != 'triton':
        raise RuntimeError(
            f"fused=True needs the Triton kernels, but the scan would run on '{backend}'; use "
            "fused='auto', or see `mmhybrid doctor` for what Triton lacks"
        )
    return fused is not False and backend == 'triton'


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
    """Selective scan that visits token ``order[p]`` at place p and leaves every y at its token.

    The Triton kernels read and write through the table; other backends get reordered copies.

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
            appears once in a row; -1 stands for a zero token (zeros in u, delta, B, C and z), as
            in windows that overhang the map. The values are not checked.
        reverse: visit the places from right to left.
        backend: see :func:`mmhybrid.ops.selective_scan`.

    Returns:
        y (B, G, H, L) in u's dtype; with ``return_last_state`` also the state after the last
        place, (B, G * H, N). Both are differentiable, once, in every floating input.

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
    groups, group_dim, tokens = u.shape[1:]
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
        y, last_state = triton_backend.scan_grouped(
            u, delta, A, B, C, D, z, delta_bias, order.int().contiguous(),
            *flags[:2],
        )  # fmt: skip
        return (y, last_state) if return_last_state else y

    order = order.long()
    live = order >= 0
    index = order.clamp_min(0)[None, :, None]

    def take(x):
        if x is None:
            return None
        taken = x.gather(-1, index.expand(x.shape[0], groups, x.shape[2], -1))
        return taken.masked_fill(~live[None, :, None], 0)

    def flat(x):
        return None if x is None else x.flatten(1, 2)

    y, last_state = selective_scan(
        flat(take(u)), flat(take(delta)), A, take(B), take(C), D, flat(take(z)), delta_bias,
        delta_softplus, True, reverse=reverse, backend=name,
    )  # fmt: skip
    # Places without a token write to one that is cut off: where each token was visited.
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    visited = order.new_zeros(len(order), tokens + 1)
    visited.scatter_(1, torch.where(live, order, tokens), places)
    visited = visited[:, :tokens][None, :, None].expand(u.shape[0], groups, group_dim, -1)
    y = y.unflatten(1, (groups, group_dim)).gather(-1, visited)
    return (y, last_state) if return_last_state else y


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
    ):  # fmt: skip
        if x is not None and x.shape != shape:
            raise ValueError(
                f'selective_scan_ordered expects {name} of shape {shape} with u of shape '
                f'{tuple(u.shape)} and B of shape {tuple(B.shape)}, got {tuple(x.shape)}.'
            )
    for name, x in (('delta', delta), ('A', A), ('B', B), ('C', C), ('D', D), ('z', z),
                    ('delta_bias', delta_bias)):  # fmt: skip
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
