"""What each scan direction of a mixer brings to one token."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.analysis.scan_response import Scan, contributions
from mmhybrid.errors import UserError
from mmhybrid.layers import SS2D, LocalSS2D, LocalVimMixer, VimMixer, decay_rates
from mmhybrid.layers.mixers.directional import Branch, scan_branches
from mmhybrid.ops.cross_scan import ScanPlan, scan_plan
from mmhybrid.ops.cross_scan.scan import scan_dtype
from mmhybrid.ops.map_conv import map_conv_reference
from mmhybrid.ops.selective_scan import choose_backend

__all__ = ['MIXERS', 'Response', 'response']

#: Mixers that scan in several directions.
MIXERS = (SS2D, VimMixer, LocalVimMixer)


@dataclass
class Response:
    """What the directions of a mixer bring to one token.

    Attributes:
        directions: K names.
        added: (K, h, w) float64, no less than 0: what each token adds through each direction, the
            sum of its absolute values over channels.
        rest: (K,) the same of what is not a token of the map: a class token, zero tokens of windows
            that overhang it.
        values: (K, E) float64, the results of the directions at the token, whose sum goes on.
        at: row and column of the token.
    """

    directions: tuple[str, ...]
    added: Tensor
    rest: Tensor
    values: Tensor
    at: tuple[int, int]


@torch.no_grad()
def response(mixer: nn.Module, x: Tensor, grid: tuple[int, int], class_token: int | None,
             place: tuple[float, float]) -> Response:
    """What the directions of a mixer bring to one token.

    Results of directions are taken as the mixer adds them up: of LocalVMamba and LocalVim under
    their attention, of LocalVim under the gate, which others apply to the sum.

    Args:
        mixer: of VMamba, LocalVMamba, Vim or LocalVim.
        x: what it reads, of one image.
        grid: height and width of the map of tokens.
        class_token: index of a token that is not of the map, None without one.
        place: parts of the map's sides, from the left and from the top.

    Raises:
        UserError: for a mixer whose directions are being searched.
    """
    searched = mixer.multi_scan if isinstance(mixer, (LocalSS2D, LocalVimMixer)) else None
    if searched is not None and hasattr(searched, 'weights'):
        raise UserError('The directions of this network are being searched, so each mixer weighs '
                        'all of them; train the network with the chosen ones first.')
    row, column = (min(int(part * side), side - 1)
                   for part, side in zip(place[::-1], grid, strict=True))
    at = row * grid[1] + column
    if class_token is not None and at >= class_token:
        at += 1
    scans, plan, factors = (_map_scans if isinstance(mixer, SS2D) else _token_scans)(mixer, x, grid)
    added, values = [], []
    kept = torch.ones(plan.num_tokens + 1, dtype=torch.bool, device=x.device)
    kept[[-1, *([] if class_token is None else [class_token])]] = False
    for k, scan in enumerate(scans):
        order = plan.order_of(k)
        position = int(order.restored_from[at])
        tokens = order.order
        if plan.reverse[k]:
            position, tokens = order.length - 1 - position, tokens.flip(0)
        parts = contributions(scan, position) * factors[k][:, at, None]
        values.append(parts.sum(dim=1))
        # zero tokens of overhanging windows come last
        added.append(parts.new_zeros(plan.num_tokens + 1).index_add_(
            0, torch.where(tokens < 0, plan.num_tokens, tokens), parts.abs().sum(dim=0)))
    sums = torch.stack(added)
    return Response(tuple(mixer.directions), sums[:, kept].unflatten(1, grid),
                    sums[:, ~kept].sum(dim=1), torch.stack(values), (row, column))


def _map_scans(mixer: SS2D, x: Tensor, grid: tuple[int, int]
               ) -> tuple[list[Scan], ScanPlan, list[Tensor]]:
    """Scans of SS2D, and the factors (E, L) of their results."""
    x = mixer.in_proj(x)
    x = x.permute(0, 2, 3, 1) if mixer.channel_first else x
    x = x.chunk(2, dim=-1)[0] if mixer.gate else x
    u = map_conv_reference(x, mixer.conv2d.weight, mixer.conv2d.bias).permute(0, 3, 1, 2)
    plan = scan_plan(mixer.directions, *grid, u.device, restore=mixer.v_restore)
    K, E, R = mixer.dt_projs_weight.shape
    N = mixer.A_logs.shape[1]
    (rates,) = decay_rates([mixer.A_logs])
    rates, skips = rates.view(K, E, N), mixer.Ds.view(K, E)
    rows = torch.einsum('krd,dl->krl', mixer.x_proj_weight, u.flatten(2)[0])
    scans = []
    for k in range(K):
        sequence, own = (_in_order(part, plan, k) for part in (u.flatten(2)[0], rows[k]))
        step, B, C = own.split([R, N, N])
        delta = F.softplus(mixer.dt_projs_weight[k] @ step + mixer.dt_projs_bias[k][:, None])
        scans.append(Scan(sequence, delta, rates[k], B, C, skips[k]))
    if not isinstance(mixer, LocalSS2D):
        return scans, plan, list(u.new_ones(K, E, plan.num_tokens))
    rates = rates.flatten(0, 1)
    ys = mixer.scan_directions(u, rates, False, choose_backend(
        mixer.backend, u.device, scan_dtype(u, rates), N))
    return scans, plan, _factors(ys, mixer.multi_scan.attn)


def _token_scans(mixer: VimMixer | LocalVimMixer, x: Tensor, grid: tuple[int, int]
                 ) -> tuple[list[Scan], ScanPlan, list[Tensor]]:
    """Scans of Vim and LocalVim, and the factors (E, L) of their results."""
    u, z = mixer.in_proj(x).mT.chunk(2, dim=1)
    plan, branches = mixer.plan(x, grid), mixer.branches()
    scans = [_branch_scan(_in_order(u[0], plan, k), branch) for k, branch in enumerate(branches)]
    if isinstance(mixer, VimMixer):
        return scans, plan, list(u.new_ones(len(branches), *u.shape[1:]))
    ys = scan_branches(u, branches, plan, z=z, backend=mixer.backend)
    gates = [plan.order_of(k).displace(F.silu(z[0])) for k in range(len(branches))]
    return scans, plan, [gate * factor for gate, factor in zip(
        gates, _factors(ys, mixer.attn), strict=True)]


def _branch_scan(sequence: Tensor, branch: Branch) -> Scan:
    conv, x_proj, dt_proj, A_log, D = branch
    size = conv.kernel_size[0]
    x = F.conv1d(sequence, conv.weight, conv.bias, padding=size - 1, groups=conv.groups)
    x = F.silu(x[:, :sequence.shape[1]])
    N = A_log.shape[1]
    step, B, C = (x_proj.weight @ x).split([dt_proj.in_features, N, N])
    delta = F.softplus(dt_proj.weight @ step + dt_proj.bias[:, None])
    return Scan(x, delta, decay_rates([A_log])[0], B, C, D)


def _in_order(tokens: Tensor, plan: ScanPlan, k: int) -> Tensor:
    """Tokens (..., L) as direction ``k`` comes across them."""
    taken = plan.order_of(k).take(tokens)
    return taken.flip(-1) if plan.reverse[k] else taken


def _factors(ys: Sequence[Tensor], attention: nn.Module | None) -> list[Tensor]:
    """By what attention multiplies results: K of (E, L), from stacks (1, k, E, L)."""
    y = torch.cat(list(ys), dim=1).permute(0, 3, 1, 2)  # 1 L K E
    attended = y if attention is None else attention(y)
    factors = torch.where(y == 0, 0, attended / y)
    return list(factors[0].permute(1, 2, 0))
