"""What mixers of plain backbones share: every direction has a convolution and a scan of its own.

Legend: B batch, L tokens, C token width, E = 2 C inner width, N states, R rank of the step.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops.cross_scan import ScanPlan
from mmhybrid.ops.precision import at_least_float32, autocast_off
from mmhybrid.ops.selective_scan import choose_backend, cpp, run_backend
from mmhybrid.ops.selective_scan.ordered import reads_tables, selective_scan_ordered
from mmhybrid.ops.walk_conv import walk_conv
from mmhybrid.ops.walk_scan import takes

__all__ = ['Branch', 'any_trained', 'prepare_mixers', 'scan_branches', 'scan_chosen', 'state_dtype']


class Branch(NamedTuple):
    """What one direction owns.

    Attributes:
        conv1d: depth-wise; looks at the tokens that come before each token in the scan.
        x_proj: E to R + 2N, without bias.
        dt_proj: R to E; its bias enters once, inside the softplus.
        A_log: (E, N).
        D: (E,).
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor


def prepare_mixers(mixers: Sequence[nn.Module], x: Tensor, grid: tuple[int, int]
                   ) -> list[tuple | str | None]:
    """What the kernels need of mixers for tokens like these, made for all at once.

    The weights of all directions of all mixers are put together, cast and turned into decay rates
    in one call for each kind, instead of one for each kind, direction and mixer.

    Args:
        mixers: each a VimMixer or LocalVimMixer, with equal widths.
        x: tokens (B, L, C) that the first one reads.
        grid: (H, W) of their map.

    Returns:
        For each mixer what its ``forward`` takes as ``prepared``: weights and tables of the Triton
        kernels, or the name of the backend that scans without them; None for a mixer that asks for
        another backend than the first one.
    """
    made: list[tuple | str | None] = [None] * len(mixers)
    if not mixers:
        return made
    A_log = mixers[0].branches()[0].A_log
    name, _ = _chosen(mixers[0].backend, x, A_log)
    alike = [i for i, mixer in enumerate(mixers) if mixer.backend == mixers[0].backend]
    together: dict[bool, list[int]] = {True: [], False: []}
    for i in alike:
        if reads_tables(name) and takes(x.numel(), A_log.shape[1]):
            # no gradient should wander through frozen mixers
            together[mixers[i].trained()].append(i)
        else:
            made[i] = name
    for ids in filter(None, together.values()):
        for i, weights in zip(ids, _weights_of([mixers[i] for i in ids], x), strict=True):
            plan = mixers[i].plan(x, grid)
            made[i] = (weights, plan.permutation(), plan.inverse_permutation(), plan)
    return made


def state_dtype(x: Tensor, A_log: Tensor) -> torch.dtype:
    """Dtype of the states of a scan over x."""
    return torch.promote_types(torch.promote_types(x.dtype, A_log.dtype), torch.float32)


def _chosen(backend: str, x: Tensor, A_log: Tensor) -> tuple[str, torch.dtype]:
    """The backend that scans x, and the dtype of its states."""
    dtype = state_dtype(x, A_log)
    return choose_backend(backend, x.device, dtype, A_log.shape[1]), dtype


def _weights_of(mixers: Sequence[nn.Module], x: Tensor) -> list[list[Tensor]]:
    """Per mixer conv_weight, conv_bias, w_x, w_dt, dt_bias, A and D of :func:`walk_scan`."""
    branches = [mixer.branches() for mixer in mixers]
    counts = [len(of_mixer) for of_mixer in branches]
    convs, x_projs, dt_projs, A_logs, Ds = zip(*chain.from_iterable(branches), strict=True)
    kind, dtype = x.device.type, x.dtype
    if not x.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with autocast_off(x.device):
        together = [
            torch.stack([conv.weight for conv in convs]).squeeze(2),
            torch.stack([conv.bias for conv in convs]),
            torch.stack([proj.weight for proj in x_projs]).to(dtype),
            torch.stack([proj.weight for proj in dt_projs]).to(dtype),
            at_least_float32(torch.stack([proj.bias for proj in dt_projs])),
            _Decay.apply(at_least_float32(torch.stack(A_logs))),
            at_least_float32(torch.stack(Ds)),
        ]
    of_mixers = zip(*(w.split(counts) for w in together), strict=True)
    return [[*own[:4], *(w.flatten(0, 1) for w in own[4:])] for own in of_mixers]


def scan_branches(u: Tensor, branches: Sequence[Branch], plan: ScanPlan, *,
                  z: Tensor | None = None, backend: str = 'auto') -> list[Tensor]:
    """Causal convolution, SiLU, projections and scan of one token row in K directions.

    The Triton kernels read and write tokens where they are and take all directions together; for
    other backends the tokens are reordered first, once per distinct order.

    Args:
        u: tokens (B, E, L) in row-major order, any strides.
        branches: K of them.
        plan: K directions of L tokens.
        z: (B, E, L), gates the results by its SiLU.
        backend: see :func:`mmhybrid.ops.selective_scan`.

    Returns:
        Stacks (B, k, E, L) that together hold the K results in order, tokens in row-major order.
    """
    return scan_chosen(u, branches, plan, z, *_chosen(backend, u, branches[0].A_log))


def scan_chosen(u: Tensor, branches: Sequence[Branch], plan: ScanPlan, z: Tensor | None,
                name: str, dtype: torch.dtype) -> list[Tensor]:
    """:func:`scan_branches` with a backend that has been chosen, in a dtype for the states."""
    if reads_tables(name):
        return plan.displace(_scan_through_tables(u, branches, plan, z, name))
    if name == 'cpp' and z is None and u.numel() and u.dtype == torch.float32 and all(
            order.identity for order in plan.orders):
        order = plan.scan_order()
        return [
            _scan_tokens(u.mT, branch, reverse, order[k:k + 1])
            for k, (branch, reverse) in enumerate(zip(branches, plan.reverse, strict=True))]
    ys = plan.restore([
        _scan_sequence(x, branch, reverse, name, dtype)
        for x, branch, reverse in zip(plan.take(u), branches, plan.reverse, strict=True)])
    if z is not None:
        gate = F.silu(z)
        # released weights know a gate that went the same wrong way as its tokens
        ys = [y * plan.order_of(k).displace(gate) for k, y in enumerate(ys)]
    return [y.unsqueeze(1) for y in ys]


def _scan_sequence(x: Tensor, branch: Branch, reverse: bool, backend: str, dtype: torch.dtype
                   ) -> Tensor:
    """One direction of a sequence (B, E, L'); if ``reverse`` nothing is flipped but the kernel."""
    conv, x_proj, dt_proj, A_log, D = branch
    L, size = x.shape[-1], conv.kernel_size[0]
    weight = conv.weight.flip(-1) if reverse else conv.weight
    x = F.conv1d(x, weight, conv.bias, padding=size - 1, groups=conv.groups)
    x = F.silu(x[..., size - 1:] if reverse else x[..., :L])
    N, R = A_log.shape[1], dt_proj.in_features
    step, B, C = torch.matmul(x_proj.weight, x).split([R, N, N], dim=1)
    y, _ = run_backend(
        backend, dtype, x, torch.matmul(dt_proj.weight, step),
        -torch.exp(at_least_float32(A_log)), B, C, D, None, dt_proj.bias, True, reverse)
    return y


def _scan_tokens(u: Tensor, branch: Branch, reverse: bool, order: Tensor) -> Tensor:
    """One direction of tokens (B, L, E) on a CPU, as (B, 1, E, L) whose channels are neighbours.

    The compiled scan reads a token's channels together.  Kept so from the input projection on,
    they need no copy; a tap of the convolution is a sum of shifted rows.
    """
    conv, x_proj, dt_proj, A_log, D = branch
    L, size = u.shape[1], conv.kernel_size[0]
    *taps, last = conv.weight.squeeze(1).t().contiguous()
    x = torch.addcmul(conv.bias, u, last)
    for back, tap in zip(range(min(size, L) - 1, 0, -1), taps[max(size - L, 0):], strict=True):
        early, late = slice(L - back), slice(back, L)
        here, there = (early, late) if reverse else (late, early)
        x[:, here].addcmul_(u[:, there], tap)
    x = F.silu(x)
    N, R = A_log.shape[1], dt_proj.in_features
    step, B, C = (t.mT.unsqueeze(1) for t in F.linear(x, x_proj.weight).split([R, N, N], dim=2))
    y, _ = cpp.scan_ordered(
        x.mT.unsqueeze(1), step, dt_proj.weight.unsqueeze(0), -torch.exp(A_log), B, C, D,
        dt_proj.bias, order, True, False)
    return y


def _scan_through_tables(u: Tensor, branches: Sequence[Branch], plan: ScanPlan, z: Tensor | None,
                         backend: str) -> Tensor:
    """All directions at once, (B, K, E, L); the channels of a token lie side by side throughout.

    After the convolution a zero token of an overhanging window is zero no more, so all values from
    there on exist for the zero tokens too, behind those of the map: S in all.
    """
    B, E, L = u.shape
    K, N, R = len(branches), branches[0].A_log.shape[1], branches[0].dt_proj.in_features
    order = plan.permutation()
    S = order.shape[1]
    x_BKES = walk_conv(u, torch.stack([b.conv1d.weight for b in branches]).squeeze(2),
                       torch.stack([b.conv1d.bias for b in branches]), order,
                       plan.inverse_permutation())

    def spread(rows, width):
        return rows.view(K, B, S, width).permute(1, 0, 3, 2)

    rows = torch.bmm(x_BKES.permute(1, 0, 3, 2).flatten(1, 2),
                     torch.stack([b.x_proj.weight for b in branches]).mT)
    step, b, c = rows.split_with_sizes([R, N, N], 2)
    delta = torch.bmm(step, torch.stack([b.dt_proj.weight for b in branches]).mT)
    if z is not None:  # one copy for all directions, where there are zero tokens
        z = (F.pad(z.mT, (0, 0, 0, S - L)).mT if S > L else z).unsqueeze(1).expand(-1, K, -1, -1)
    y_BKES = selective_scan_ordered(
        x_BKES, spread(delta, E),
        -torch.exp(at_least_float32(torch.cat([b.A_log for b in branches]))), spread(b, N),
        spread(c, N), torch.cat([b.D for b in branches]), z,
        torch.cat([b.dt_proj.bias for b in branches]), True, order=order, backend=backend)
    return y_BKES.mT[:, :, :L].mT  # cut with the channels last, so that its gradient lies that way


class _Decay(torch.autograd.Function):
    """A = -exp(A_log), keeping A alone, which the scan keeps, too."""

    @staticmethod
    def forward(ctx, A_log):
        A = torch.exp(A_log).neg_()
        ctx.save_for_backward(A)
        return A

    @staticmethod
    def backward(ctx, dA):
        (A,) = ctx.saved_tensors
        return dA * A


def any_trained(branches: Sequence[Branch]) -> bool:
    """Whether any of these weights wants a gradient."""
    return any(
        p.requires_grad
        for conv, x_proj, dt_proj, *rest in branches
        for p in (conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, *rest))
