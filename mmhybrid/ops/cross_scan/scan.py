"""Maps to sequences, sequences to maps, and the scan over all directions of a map."""
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import autocast_off
from ..selective_scan import choose_backend, cpp, run_backend
from ..selective_scan.launch import eager, fast_apply
from ..selective_scan.ordered import selective_scan_ordered
from .orders import ScanPlan, scan_plan

__all__ = ['cross_merge', 'cross_restore', 'cross_scan', 'cross_selective_scan']


def cross_scan(x: Tensor, directions: Sequence[str]) -> list[Tensor]:
    """Read a map in the given directions.

    Args:
        x: (B, D, H, W), any dtype.
        directions: K names such as ``('h', 'h_flip', 'v', 'v_flip')``.

    Returns:
        K sequences (B, D, L'_k).  Those of flipped directions are flipped copies; use
        :func:`scan_plan` where the reader can start at the end, which needs none.
    """
    plan = scan_plan(directions, *x.shape[-2:], x.device)
    return [taken.flip(-1) if reverse else taken
            for taken, reverse in zip(plan.take(x.flatten(2)), plan.reverse, strict=True)]


def cross_restore(ys: Sequence[Tensor], directions: Sequence[str], height: int, width: int, *,
                  restore: str = 'exact') -> list[Tensor]:
    """Put K sequences (B, D, L'_k), as :func:`cross_scan` gives them, back on the map.

    Returns:
        K maps (B, D, H, W).  For ``restore`` see :func:`scan_plan`.
    """
    plan = scan_plan(directions, height, width, ys[0].device, restore=restore)
    ys = [y.flip(-1) if reverse else y for y, reverse in zip(ys, plan.reverse, strict=True)]
    return [y.unflatten(-1, (height, width)) for y in plan.restore(ys)]


def cross_merge(ys: Sequence[Tensor], directions: Sequence[str], height: int, width: int, *,
                restore: str = 'exact') -> Tensor:
    """Sum of the restored maps, (B, D, H, W); the inverse of :func:`cross_scan` times K."""
    return torch.stack(cross_restore(ys, directions, height, width, restore=restore)).sum(0)


def cross_selective_scan(u: Tensor, x_proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor,
                         dt_bias: Tensor, plan: ScanPlan, *, merge: bool = True,
                         float32: bool = False, backend: str = 'auto') -> Tensor | list[Tensor]:
    """Selective scan of one map in K directions, results back in row-major order.

    Everything that goes in is row-major and exists once: the step, input and output projections
    act token by token, so they commute with any order.  Directions are given by the plan alone
    (an order table and a flag): the Triton and the compiled CPU kernels read and write through the
    table and no copy per direction exists; for other backends the tokens are reordered before the
    scan.

    Symbols: B batch, K directions, D channels, L tokens, N states, R rank of the step.

    Args:
        u: (B, D, L), any strides.
        x_proj: (K, R + 2N, D); per direction it makes R values of the step, N of B and N of C from
            a token.  A zero token of an overhanging window gives zeros.
        dt_weight: (K, D, R), expands the step to D channels.
        A: (K * D, N), negative.
        D: (K * D,), the skip.
        dt_bias: (K * D,), added before the softplus.
        plan: from :func:`scan_plan`.
        merge: sum over the directions, or their results in stacks.
        float32: the scan and its results are in float32 under autocast and for half precision, the
            projections in the precision of ``u`` with the Triton kernels, else in float32.
        backend: see :func:`mmhybrid.ops.selective_scan`.

    Returns:
        (B, D, L), or a list of stacks (B, k, D, L) that together hold the K results in order;
        dtype of ``u`` unless ``float32``.

    Source: VMamba (arXiv 2401.10166), section 4.2; LocalMamba (arXiv 2403.09338), section 3.1.
    """
    name = choose_backend(backend, u.device, scan_dtype(u, A), A.shape[-1])
    return scan_directions(u, x_proj, dt_weight, A, D, dt_bias, plan, merge, float32, name)


def scan_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    """Precision of the state."""
    return torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)


def scan_directions(u: Tensor, x_proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor,
                    dt_bias: Tensor, plan: ScanPlan, merge: bool, float32: bool, backend: str
                    ) -> Tensor | list[Tensor]:
    """:func:`cross_selective_scan` by a backend that ``choose_backend`` has named."""
    K = dt_weight.shape[0]
    if len(plan.directions) != K or u.shape[-1] != plan.num_tokens:
        raise ValueError(
            f'weights for {K} directions and a map of {u.shape[-1]} tokens came with a plan for '
            f'{len(plan.directions)} directions and {plan.num_tokens} tokens; build the plan with '
            'scan_plan(directions, height, width) of this map')
    if backend == 'triton':
        ys = _scan_through_tables(u, x_proj, dt_weight, A, D, dt_bias, plan, float32)
    else:
        # Channels side by side are what the compiled kernel reads, too.
        u = u.mT.contiguous().mT if backend == 'cpp' else u
        proj = F.linear(u.mT, x_proj.flatten(0, 1)).mT.unflatten(1, (K, -1))

        def scan(u, proj):
            inputs = u, proj, dt_weight, A, D, dt_bias, plan
            if backend == 'cpp':
                return _scan_compiled(*inputs, merge)
            return _scan_copies(*inputs, backend, scan_dtype(u, A), merge)

        if not float32:
            ys = scan(u, proj)
        else:
            with autocast_off(u.device):
                ys = scan(_wide(u), _wide(proj))
    return _total([y.squeeze(1) if y.shape[1] == 1 else y.sum(1) for y in ys]) if merge else ys


def _scan_through_tables(u: Tensor, x_proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor,
                         dt_bias: Tensor, plan: ScanPlan, float32: bool) -> list[Tensor]:
    """One call for all directions: the kernels read and write tokens where they are."""
    # Channels side by side are what the kernels read; one copy serves all directions.
    u_BLD, dtype = u.mT.contiguous(), u.dtype
    wide = torch.promote_types(dtype, torch.float32) if float32 else dtype
    inputs = u_BLD, x_proj.to(dtype), dt_weight.to(dtype), wide
    kind = u.device.type
    cast = kind != 'meta' and torch.is_autocast_enabled(kind)
    if cast and torch.get_autocast_dtype(kind) != dtype:
        with autocast_off(u.device):
            u, delta, b, c = _Inputs.apply(*inputs)
    else:  # autocast finds nothing to cast
        u, delta, b, c = (_apply_inputs if eager() else _Inputs.apply)(*inputs)
    y = selective_scan_ordered(
        u, delta, A, b, c, D, delta_bias=dt_bias, delta_softplus=True, order=plan.scan_order(),
        backend='triton')
    return plan.displace(y)


class _Inputs(torch.autograd.Function):
    """What the scan reads of a map in K directions.

    In one function, because the gradients of the map then meet in one sum, and those of all parts
    of a projection are put together where they lie.  Each product is one call for the tokens of all
    images, for which nothing is laid out anew.
    """

    @staticmethod
    def forward(ctx, u_BLD: Tensor, x_proj: Tensor, dt_weight: Tensor, wide: torch.dtype
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, tokens, channels = u_BLD.shape
        K, _, rank = dt_weight.shape
        proj = F.linear(u_BLD.flatten(0, 1), x_proj.flatten(0, 1))
        proj = proj.view(batch * tokens, K, -1)
        step_TKR, b, c = proj.tensor_split((rank, (rank + proj.shape[2]) // 2), 2)
        delta = torch.bmm(step_TKR.transpose(0, 1), dt_weight.mT)
        ctx.save_for_backward(u_BLD, x_proj, dt_weight, step_TKR)
        u = (u_BLD.view_as(u_BLD) if u_BLD.dtype == wide else u_BLD.to(wide)).mT
        b, c = (x.view(batch, tokens, K, -1).permute(0, 2, 3, 1) for x in (b, c))
        return (u.unsqueeze(1).expand(-1, K, -1, -1),
                delta.view(K, batch, tokens, channels).permute(1, 0, 3, 2), b, c)

    @staticmethod
    def backward(ctx, du: Tensor, ddelta: Tensor, db: Tensor, dc: Tensor):
        u_BLD, x_proj, dt_weight, step_TKR = ctx.saved_tensors
        ddelta = ddelta.permute(1, 0, 3, 2).flatten(1, 2)
        dstep = torch.bmm(ddelta, dt_weight).transpose(0, 1)
        dstep = dstep.view(*u_BLD.shape[:2], *dstep.shape[1:])
        ddt_weight = torch.bmm(ddelta.mT, step_TKR.transpose(0, 1))
        dproj = torch.cat([dstep, *(x.permute(0, 3, 1, 2) for x in (db, dc))], 3)
        dproj = dproj.flatten(0, 1).flatten(1)
        du = du.mT.sum(1).to(u_BLD.dtype)
        du.flatten(0, 1).addmm_(dproj, x_proj.flatten(0, 1))
        dx_proj = (dproj.mT @ u_BLD.flatten(0, 1)).view(x_proj.shape)
        return du, dx_proj, ddt_weight, None


_apply_inputs = fast_apply(_Inputs)


def _scan_compiled(u: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor,
                   dt_bias: Tensor, plan: ScanPlan, merge: bool) -> list[Tensor]:
    """The same on a CPU: the kernel also expands the step, and sums the directions if it may."""
    rank = dt_weight.shape[2]
    step, b, c = proj.split_with_sizes([rank, A.shape[-1], A.shape[-1]], 2)
    y, _ = cpp.scan_ordered(u.unsqueeze(1), step, dt_weight, A, b, c, D, dt_bias,
                            plan.scan_order(), True, merge and plan.exact)
    return plan.displace(y.to(u.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scan_copies(u: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor,
                 dt_bias: Tensor, plan: ScanPlan, backend: str, dtype: torch.dtype, merge: bool
                 ) -> list[Tensor]:
    """Tokens are reordered before the scan and put back after it; merged, K is 1."""
    K, channels, rank = dt_weight.shape
    N = A.shape[-1]
    A, D, dt_bias = (t.unflatten(0, (K, channels)) for t in (A, D, dt_bias))
    sequences: dict[tuple[int, ...], Tensor] = {}
    ys: list[Tensor | None] = [None] * K
    for reverse, ks in plan.groups():
        ids = tuple(plan.order_ids[k] for k in ks)
        if ids not in sequences:  # both senses read the same sequences
            sequences[ids] = torch.cat([plan.orders[i].take(u) for i in ids], dim=1)
        rows = torch.stack([plan.order_of(k).take(proj[:, k]) for k in ks], dim=1)
        step, b, c = rows.split_with_sizes([rank, N, N], 2)
        delta = (_pick(dt_weight, ks).to(step.dtype) @ step).flatten(1, 2)
        y, _ = run_backend(
            backend, dtype, sequences[ids], delta, _pick(A, ks).flatten(0, 1), b, c,
            _pick(D, ks).flatten(), None, _pick(dt_bias, ks).flatten(), True, reverse)
        for k, y_k in zip(ks, y.chunk(len(ks), dim=1), strict=True):
            ys[k] = y_k
    if merge:
        return [plan.restored_sum(ys).unsqueeze(1)]
    return [y.unsqueeze(1) for y in plan.restore(ys)]


def _total(tensors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _pick(t: Tensor, ks: list[int]) -> Tensor:
    """Rows ``ks`` of dimension 0; a view where they are evenly spaced."""
    if len(ks) == t.shape[0]:
        return t
    step = ks[1] - ks[0] if len(ks) > 1 else 1
    even = step > 0 and ks == list(range(ks[0], ks[-1] + 1, step))
    # t[ks] would copy the list to a GPU, which waits and which no CUDA graph can hold.
    return t[ks[0]:ks[-1] + 1:step] if even else torch.stack([t[k] for k in ks])
