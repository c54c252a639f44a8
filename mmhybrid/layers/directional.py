"""Mixers of plain backbones: every direction has a convolution and a scan of its own.

Legend: B batch, L tokens, C token width, E = 2 C inner width, N states, R rank of the step.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops import selective_scan
from mmhybrid.ops.cross_scan import DIRECTIONS, scan_plan

from .direction_merge import ChannelAttention, DirectionMixture, merge_directions
from .linear import token_linear
from .precision import at_least_float32
from .scan_init import init_decay_, init_step_bias_

__all__ = ['LocalVimMixer', 'VimMixer', 'scan_branch']


def scan_branch(x: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor,
                D: Tensor, *, reverse: bool = False, backend: str = 'auto') -> Tensor:
    """Causal convolution, SiLU, projections and scan of one direction.

    Args:
        x: sequence (B, E, L).
        conv: depth-wise; looks at the tokens before each token along the walk.
        x_proj: E to R + 2N, without bias.
        dt_proj: R to E; its bias enters once, inside the softplus.
        A_log: (E, N).
        D: (E,).
        reverse: walk from the last token to the first.  Nothing is flipped but the kernel.
        backend: see :func:`mmhybrid.ops.selective_scan`.

    Returns:
        (B, E, L), not gated.
    """
    L, size = x.shape[-1], conv.kernel_size[0]
    weight = conv.weight.flip(-1) if reverse else conv.weight
    x = F.conv1d(x, weight, conv.bias, padding=size - 1, groups=conv.groups)
    x = F.silu(x[..., size - 1:] if reverse else x[..., :L])
    N, R = A_log.shape[1], dt_proj.in_features
    step, B, C = torch.matmul(x_proj.weight, x).split([R, N, N], dim=1)
    return selective_scan(
        x, torch.matmul(dt_proj.weight, step), -torch.exp(at_least_float32(A_log)), B, C, D,
        delta_bias=dt_proj.bias, delta_softplus=True, reverse=reverse, backend=backend)


class VimMixer(nn.Module):
    """Gated scan over a token sequence in both senses.

    From Zhu et al., "Vision Mamba" (arXiv 2401.09417), section 3.3.  The input projection and the
    gate are shared by both directions, so the gate is applied once to their sum.

    Args:
        dim: C.
        state_dim: N.
        conv_size: kernel of the causal convolutions.
        dt_rank: R; None for ceil(C / 16).
        divide: take the mean of the directions instead of the sum.
        depth: blocks of the network; the output projection starts smaller by its root.
        backend: scan implementation, see :func:`mmhybrid.ops.selective_scan`.
    """

    directions = ('h', 'h_flip')

    def __init__(self, dim: int, state_dim: int = 16, conv_size: int = 4,
                 dt_rank: int | None = None, divide: bool = True, depth: int = 24,
                 backend: str = 'auto'):
        super().__init__()
        inner = 2 * dim
        R = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.divide, self.backend = divide, backend
        self.A_log = nn.Parameter(torch.empty(inner, state_dim))
        self.D = nn.Parameter(torch.ones(inner))
        self.A_b_log = nn.Parameter(torch.empty(inner, state_dim))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_size, groups=inner)
        self.x_proj = nn.Linear(inner, R + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(R, inner)
        self.conv1d_b = nn.Conv1d(inner, inner, conv_size, groups=inner)
        self.x_proj_b = nn.Linear(inner, R + 2 * state_dim, bias=False)
        self.dt_proj_b = nn.Linear(R, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        for tensor in (self.A_log, self.A_b_log):
            init_decay_(tensor)
            # read by optimizer constructors that spare the dynamics of the state from decay
            tensor._no_weight_decay = True
        for tensor in (self.D, self.D_b):
            tensor._no_weight_decay = True
        # The release leaves the reverse bias at 0, a step of 0.69; both start as Mamba means it.
        init_step_bias_(self.dt_proj.bias)
        init_step_bias_(self.dt_proj_b.bias)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def branches(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens (B, L, C) to the results of both directions and the gate, each (B, E, L)."""
        u, z = self.in_proj(x).mT.chunk(2, dim=1)
        plan = scan_plan(self.directions, 1, x.shape[1], x.device)
        weights = (
            (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D),
            (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b))
        ys = [
            scan_branch(plan.order_of(k).take(u), *weights[k], reverse=plan.reverse[k],
                        backend=self.backend) for k in range(2)]
        return ys, F.silu(z)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Shape (B, L, C) in and out; the shape of the map plays no role."""
        (forward, backward), gate = self.branches(x)
        y = (forward + backward) * gate
        # Half of the weight is half of the result, in every digit.
        weight = self.out_proj.weight * 0.5 if self.divide else self.out_proj.weight
        return F.linear(y.mT, weight)


class LocalVimMixer(nn.Module):
    """Gated scans over a token map in several directions under channel attention.

    From Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
    2403.09338), section 3.  The gate acts token by token, so it needs no scan order of its own.

    Args:
        dim: C.
        directions: K scan directions; None for all eight in learned shares, the form in which
            directions are searched.
        class_token: whether the sequence has a class token in its middle.  It is read at the same
            index by every direction.
        v_restore: see :class:`mmhybrid.layers.ss2d.SS2D`.
        state_dim: N.
        conv_size: kernel of the causal convolutions.
        dt_rank: R; None for ceil(C / 16).
        depth: blocks of the network; the output projection starts smaller by its root.
        backend: scan implementation, see :func:`mmhybrid.ops.selective_scan`.
    """

    def __init__(self, dim: int, directions: Sequence[str] | None, *, class_token: bool = False,
                 v_restore: str = 'exact', state_dim: int = 16, conv_size: int = 4,
                 dt_rank: int | None = None, depth: int = 20, backend: str = 'auto'):
        super().__init__()
        inner = 2 * dim
        R = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.directions = tuple(directions or DIRECTIONS)
        self.class_token, self.v_restore, self.backend = class_token, v_restore, backend
        # Plans are cheap; building one here refuses unknown directions before training starts.
        scan_plan(self.directions, 1, 1, restore=v_restore)
        self.in_proj = token_linear(dim, 2 * inner, bias=False)
        for k in range(len(self.directions)):
            A_log = nn.Parameter(init_decay_(torch.empty(inner, state_dim)))
            D = nn.Parameter(torch.ones(inner))
            # read by optimizer constructors that spare the dynamics of the state from decay
            A_log._no_weight_decay = D._no_weight_decay = True
            self.register_parameter(f'A_log_{k}', A_log)
            self.register_parameter(f'D_{k}', D)
            self.add_module(f'conv1d_{k}', nn.Conv1d(inner, inner, conv_size, groups=inner))
            self.add_module(f'x_proj_{k}', token_linear(inner, R + 2 * state_dim, bias=False))
            step = nn.Linear(R, inner)
            # The release overwrites this with zeros, a step of 0.69; here it is as in Mamba.
            init_step_bias_(step.bias)
            self.add_module(f'dt_proj_{k}', step)
        self.multi_scan = None if directions else DirectionMixture(len(self.directions))
        self.attn = ChannelAttention(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, L, C) of a map of ``grid`` = (H, W) in and out."""
        u, z = self.in_proj(x).mT.chunk(2, dim=1)
        plan = scan_plan(self.directions, *grid, x.device, restore=self.v_restore,
                         class_token=grid[0] * grid[1] // 2 if self.class_token else None)
        sequences = [order.take(u) for order in plan.orders]
        y = merge_directions((self._branch(k, plan, sequences, z).mT
                              for k in range(len(self.directions))),
                             self.attn, self.multi_scan() if self.multi_scan else None)
        return self.out_proj(y)

    def _branch(self, k: int, plan, sequences: list[Tensor], z: Tensor) -> Tensor:
        """Gated result (B, E, L) of direction ``k``."""
        order = plan.order_of(k)
        y = scan_branch(
            sequences[plan.order_ids[k]], getattr(self, f'conv1d_{k}'),
            getattr(self, f'x_proj_{k}'), getattr(self, f'dt_proj_{k}'),
            getattr(self, f'A_log_{k}'), getattr(self, f'D_{k}'), reverse=plan.reverse[k],
            backend=self.backend)
        if not order.exact:  # the gate went the same wrong way
            z = order.restore(order.take(z))
        return order.restore(y) * F.silu(z)
