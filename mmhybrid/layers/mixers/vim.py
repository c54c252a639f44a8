"""The mixer of Vim: a gated scan in both senses.

Legend: B batch, L tokens, C token width, E = 2 C inner width, N states, R rank of the step.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops.cross_scan import ScanPlan, scan_plan
from mmhybrid.ops.walk_scan import walk_scan

from ..scan_init import init_decay_, init_step_bias_
from .directional import Branch, any_trained, prepare_mixers, scan_chosen, state_dtype

__all__ = ['VimMixer']


class VimMixer(nn.Module):
    """Gated scan over a token sequence in both senses.

    From Zhu et al., "Vision Mamba" (arXiv 2401.09417), section 3.3.  The input projection and the
    gate are shared by both directions, so the gate is applied once to their sum.

    Args:
        dim: number of channels C.
        state_dim: number of states N.
        conv_size: kernel of the causal convolutions.
        dt_rank: R; None for ceil(C / 16).
        divide: take the mean of the directions instead of the sum.
        depth: blocks of the network; the output projection starts smaller by its root.
        backend: scan implementation, see :func:`mmhybrid.ops.selective_scan`.
    """

    directions = ('h', 'h_flip')
    # In float32, see weight_casts.py.
    reads_itself = 'conv1d', 'conv1d_b', 'dt_proj.bias', 'dt_proj_b.bias'

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

    def trained(self) -> bool:
        """Whether any direction's weights want gradients."""
        return any_trained(self.branches())

    def branches(self) -> tuple[Branch, Branch]:
        """What the two directions own."""
        return (Branch(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D),
                Branch(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b))

    def plan(self, x: Tensor, grid: tuple[int, int] | None) -> ScanPlan:
        """How tokens (B, L, C) are read."""
        return scan_plan(self.directions, 1, x.shape[1], x.device)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None,
                prepared: tuple | None = None) -> Tensor:
        """Shape (B, L, C) in and out; the shape of the map plays no role.

        Args:
            x: tokens.
            grid: of a map, as all mixers get it.
            prepared: of this mixer by :func:`prepare_mixers`, None to prepare it here.
        """
        if prepared is None:
            (prepared,) = prepare_mixers([self], x, grid)
        uz = self.in_proj(x)
        if not isinstance(prepared, str):
            weights, slots, steps, _ = prepared
            y = walk_scan(uz, *weights, slots, steps, 0.5 if self.divide else 1.)
            return self.out_proj(y)
        u, z = uz.mT.chunk(2, dim=1)
        ys = scan_chosen(u, self.branches(), self.plan(x, grid), None, prepared,
                            state_dtype(u, self.A_log))
        y = (ys[0].sum(1) if len(ys) == 1 else sum(ys[1:], ys[0]).squeeze(1)) * F.silu(z)
        # Half of the weight is half of the result, in every digit.
        weight = self.out_proj.weight * 0.5 if self.divide else self.out_proj.weight
        return F.linear(y.mT, weight)
