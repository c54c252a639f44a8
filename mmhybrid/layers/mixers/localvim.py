"""The mixer of LocalVim: gated scans in several directions under channel attention.

Legend: B batch, L tokens, C token width, E = 2 C inner width, N states, R rank of the step.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmhybrid.ops.cross_scan import DIRECTIONS, ScanPlan, scan_plan
from mmhybrid.ops.walk_scan import walk_scan

from ..direction_merge import DirectionMixture, make_attention, merge_directions
from ..linear import token_linear
from ..scan_init import init_decay_, init_step_bias_
from .directional import Branch, any_trained, prepare_mixers, scan_chosen, state_dtype

__all__ = ['LocalVimMixer']


class LocalVimMixer(nn.Module):
    """Gated scans over a token map in several directions under channel attention.

    From Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
    2403.09338), section 3.  The gate acts token by token, so it needs no scan order of its own.

    Args:
        dim: number of channels C.
        directions: K scan directions; None for all eight under learned weights, the form in which
            directions are searched.
        class_token: whether the sequence has a class token in its middle.  It is read at the same
            position by every direction.
        v_restore: see :class:`mmhybrid.layers.mixers.ss2d.SS2D`.
        state_dim: number of states N.
        conv_size: kernel of the causal convolutions.
        dt_rank: R; None for ceil(C / 16).
        depth: blocks of the network; the output projection starts smaller by its root.
        backend: scan implementation, see :func:`mmhybrid.ops.selective_scan`.
        attention: see :class:`mmhybrid.layers.mixers.ss2d.LocalSS2D`.
    """

    def __init__(self, dim: int, directions: Sequence[str] | None, *, class_token: bool = False,
                 v_restore: str = 'exact', state_dim: int = 16, conv_size: int = 4,
                 dt_rank: int | None = None, depth: int = 20, backend: str = 'auto',
                 attention: str = 'channel'):
        super().__init__()
        inner = 2 * dim
        R = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.directions = tuple(directions or DIRECTIONS)
        self.class_token, self.v_restore = class_token, v_restore
        self.backend = backend
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
        self.attn = make_attention(attention, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)

    def trained(self) -> bool:
        """Whether any direction's weights want gradients."""
        return any_trained(self.branches())

    @property
    def reads_itself(self) -> list[str]:
        """What is read in float32, see weight_casts.py."""
        names = 'conv1d_{}', 'dt_proj_{}.bias'
        return [name.format(k) for name in names for k in range(len(self.directions))]

    def branches(self) -> list[Branch]:
        """What the K directions own."""
        return [Branch(getattr(self, f'conv1d_{k}'), getattr(self, f'x_proj_{k}'),
                       getattr(self, f'dt_proj_{k}'), getattr(self, f'A_log_{k}'),
                       getattr(self, f'D_{k}')) for k in range(len(self.directions))]

    def plan(self, x: Tensor, grid: tuple[int, int]) -> ScanPlan:
        """How tokens (B, L, C) of a map of this shape are read."""
        return scan_plan(self.directions, *grid, x.device, restore=self.v_restore,
                         class_token=grid[0] * grid[1] // 2 if self.class_token else None)

    def forward(self, x: Tensor, grid: tuple[int, int], prepared: tuple | None = None) -> Tensor:
        """Tokens (B, L, C) of a map of ``grid`` = (H, W) in and out.

        Args:
            x: tokens.
            grid: (H, W).
            prepared: of this mixer by :func:`prepare_mixers`, None to prepare it here.
        """
        if prepared is None:
            (prepared,) = prepare_mixers([self], x, grid)
        uz = self.in_proj(x)
        if not isinstance(prepared, str):
            weights, slots, steps, plan = prepared
            y = walk_scan(uz, *weights, slots, steps)
            # cut with the channels last, so that its gradient lies that way
            ys = plan.displace(y.mT[:, :, :x.shape[1]].mT)
        else:
            u, z = uz.mT.chunk(2, dim=1)
            ys = scan_chosen(u, self.branches(), self.plan(x, grid), z, prepared,
                                state_dtype(u, self.A_log_0))
        y = merge_directions(ys, self.attn, self.multi_scan() if self.multi_scan else None)
        return self.out_proj(y)
