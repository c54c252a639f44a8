"""Selective scan over a map in several directions (SS2D).

Legend: B batch, H W map, L = H * W tokens, C block width, D inner width, K directions, N states,
R rank of the step.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops.cross_scan import DIRECTIONS, cross_selective_scan, scan_plan

from .direction_merge import ChannelAttention, DirectionMixture, merge_directions
from .linear2d import map_linear
from .norm import LayerNorm2d
from .precision import at_least_float32
from .scan_init import init_decay_, init_step_bias_

__all__ = ['LocalSS2D', 'SS2D']


class SS2D(nn.Module):
    """Token mixer of VMamba: convolution, scans in K directions, their sum, a linear layer.

    From Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), section 4.2.  Without
    gate this is the form of the current models, with gate that of the first release.

    Args:
        dim: C.
        state_dim: N.
        ratio: D / C.
        dt_rank: R; None for ceil(C / 16).
        directions: K scan directions, see :mod:`mmhybrid.ops.cross_scan`.
        gate: multiply the result by SiLU of a second projection of the input.
        conv_bias: bias of the depth-wise 3x3 convolution.
        channel_first: maps are (B, C, H, W) instead of (B, H, W, C).  Weights are the same.
        float32_scan: scan in float32 under mixed precision, as the first release does.
        v_restore: 'exact', or 'released' for the column restore of LocalMamba's release, which is
            wrong for maps that are not square.
        backend: scan implementation, see :func:`mmhybrid.ops.selective_scan`.
    """

    def __init__(self, dim: int, *, state_dim: int = 1, ratio: float = 2.0,
                 dt_rank: int | None = None,
                 directions: Sequence[str] = ('h', 'v', 'h_flip', 'v_flip'), gate: bool = False,
                 conv_bias: bool = False, channel_first: bool = False, float32_scan: bool = False,
                 v_restore: str = 'exact', backend: str = 'auto'):
        super().__init__()
        inner, K, N = int(ratio * dim), len(directions), state_dim
        R = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.directions, self.v_restore = tuple(directions), v_restore
        self.gate, self.channel_first, self.float32_scan = gate, channel_first, float32_scan
        self.backend = backend
        # Plans are cheap; building one here refuses unknown directions before training starts.
        scan_plan(self.directions, 1, 1, restore=v_restore)

        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2 * N, inner))
        self.A_logs = nn.Parameter(torch.empty(K * inner, N))
        self.Ds = nn.Parameter(torch.empty(K * inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, inner, R))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, inner))
        self.out_norm = (LayerNorm2d if channel_first else nn.LayerNorm)(inner)
        self.in_proj = map_linear(dim, inner * (1 + gate), bias=False, channel_first=channel_first)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.out_proj = map_linear(inner, dim, bias=False, channel_first=channel_first)
        # read by optimizer constructors that spare the dynamics of the state from decay
        self.A_logs._no_weight_decay = True
        self.Ds._no_weight_decay = True
        self.reset_scan_parameters()

    @property
    def reads_cast(self) -> tuple[str, ...]:
        """What autocast casts besides layers, see weight_casts.py."""
        return ('x_proj_weight',) if self.float32_scan else ('x_proj_weight', 'dt_projs_weight')

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Initialise the scan as Mamba does."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        bound = self.dt_projs_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.dt_projs_weight, -bound, bound)
        init_step_bias_(self.dt_projs_bias)
        init_decay_(self.A_logs)
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) in and out, or (B, H, W, C) if not ``channel_first``."""
        x = self.in_proj(x)
        z = None
        if self.gate:
            x, z = x.chunk(2, dim=1 if self.channel_first else -1)
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2)  # convolution and scan work on B D H W
        x = F.silu(self.conv2d(x))
        y = self.out_norm(self.scan(x)).to(x.dtype)
        if self.gate:
            y = y * F.silu(z)
        return self.out_proj(y)

    def scan(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) to the sum of its scans, in the layout of this module."""
        y = self.scan_directions(x, merge=True)
        return y.view(x.shape) if self.channel_first else y.view(x.shape).permute(0, 2, 3, 1)

    def scan_directions(self, x: Tensor, merge: bool) -> Tensor | list[Tensor]:
        """Map (B, D, H, W) to (B, D, L), or to stacks (B, k, D, L) of them if not ``merge``."""
        plan = scan_plan(self.directions, *x.shape[-2:], x.device, restore=self.v_restore)
        y = cross_selective_scan(
            x.flatten(2), self.x_proj_weight, self.dt_projs_weight,
            -torch.exp(at_least_float32(self.A_logs)), self.Ds, self.dt_projs_bias.flatten(), plan,
            merge=merge, float32=self.float32_scan, backend=self.backend)
        # what follows has the precision of its weights
        dtype = self.out_norm.weight.dtype
        return y.to(dtype) if merge else [y_k.to(dtype) for y_k in y]


class LocalSS2D(SS2D):
    """Token mixer of LocalVMamba: gated SS2D with windowed directions under channel attention.

    From Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
    2403.09338), section 3.  Maps are (B, H, W, C).

    Args:
        dim: C.
        directions: K scan directions; None for all eight under learned weights, the form in which
            directions are searched.
        **options: of :class:`SS2D`.
    """

    def __init__(self, dim: int, directions: Sequence[str] | None, **options):
        super().__init__(dim, directions=directions or DIRECTIONS, gate=True, channel_first=False,
                         **options)
        self.multi_scan = DirectionMixture(len(self.directions)) if not directions else nn.Module()
        self.multi_scan.attn = ChannelAttention(self.out_norm.normalized_shape[0])

    def scan(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) to the merged scans (B, H, W, D)."""
        searching = isinstance(self.multi_scan, DirectionMixture)
        ys = self.scan_directions(x, merge=False)
        y = merge_directions(ys, self.multi_scan.attn, self.multi_scan() if searching else None)
        return y.unflatten(1, x.shape[-2:])
