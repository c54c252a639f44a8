"""Selective scan over a map in several directions (SS2D).

Legend: B batch, H W map, L = H * W tokens, C block width, D inner width, K directions, N states,
R rank of the step.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops.cross_scan import DIRECTIONS, scan_plan
from mmhybrid.ops.cross_scan.scan import scan_directions, scan_dtype
from mmhybrid.ops.map_conv import map_conv, map_conv_reference
from mmhybrid.ops.merge_norm import Attention, attend_norm, merge_norm
from mmhybrid.ops.precision import at_least_float32
from mmhybrid.ops.selective_scan import choose_backend

from .. import onednn
from ..direction_merge import DirectionMixture, make_attention, merge_directions
from ..linear import map_linear
from ..norm import LayerNorm, LayerNorm2d
from ..scan_init import init_decay_, init_step_bias_

__all__ = ['LocalSS2D', 'SS2D', 'decay_rates']


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module, which then has to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def registered(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias in at least float32, past copies that are cast for autocast."""
    weight, bias = layer._parameters['weight'], layer._parameters['bias']
    return at_least_float32(weight), at_least_float32(bias)


def decay_rates(logs: Sequence[Tensor]) -> Sequence[Tensor]:
    """A = -exp(A_log) of many scans, in few calls for all of them; at least float32."""
    if torch.compiler.is_compiling():  # it fuses these by itself
        return [-torch.exp(at_least_float32(log)) for log in logs]
    found: list[Tensor | None] = [None] * len(logs)
    for learned in (False, True):  # apart: results of one call all want gradients or none does
        group = [i for i, log in enumerate(logs) if log.requires_grad == learned]
        if group:
            rates = _Rates.apply(*(at_least_float32(logs[i]) for i in group))
            for i, rate in zip(group, rates, strict=True):
                found[i] = rate
    return found


class _Rates(torch.autograd.Function):
    """The rates; their own slopes are themselves."""

    @staticmethod
    def forward(ctx, *logs: Tensor) -> tuple[Tensor, ...]:
        rates = torch._foreach_exp(logs)
        torch._foreach_neg_(rates)
        ctx.save_for_backward(*rates)
        ctx.set_materialize_grads(False)
        return tuple(rates)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * len(grads)
        rates = ctx.saved_tensors
        if given:
            products = torch._foreach_mul([grads[i] for i in given], [rates[i] for i in given])
            for i, product in zip(given, products, strict=True):
                found[i] = product
        return tuple(found)


class SS2D(nn.Module):
    """Token mixer of VMamba: convolution, scans in K directions, their sum, a linear layer.

    From Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), section 4.2.  Without
    gate this is the form of the current models, with gate that of the first release.

    Args:
        dim: number of channels C.
        state_dim: number of states N.
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

    # What is read in float32, and what autocast casts besides layers; see weight_casts.py.
    reads_itself = ('conv2d',)
    reads_cast = ('x_proj_weight', 'dt_projs_weight')

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
        self.out_norm = (
            LayerNorm2d(inner, feeds_linear=not gate, channels_last=True) if channel_first
            else LayerNorm(inner, feeds_linear=not gate))
        self.in_proj = map_linear(dim, inner * (1 + gate), bias=False, channel_first=channel_first)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.out_proj = map_linear(inner, dim, bias=False, channel_first=channel_first)
        # read by optimizer constructors that spare the dynamics of the state from decay
        self.A_logs._no_weight_decay = True
        self.Ds._no_weight_decay = True
        self.reset_scan_parameters()

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

    def forward(self, x: Tensor, rates: Tensor | None = None) -> Tensor:
        """Map to map of the same shape.

        Args:
            x: (B, C, H, W), or (B, H, W, C) if not ``channel_first``.
            rates: :func:`decay_rates` of ``A_logs``, if a network has them of all its mixers.
        """
        if rates is None:
            (rates,) = decay_rates([self.A_logs])
        x, gate = self.project(x)
        name = choose_backend(self.backend, x.device, scan_dtype(x, self.A_logs),
                              self.A_logs.shape[1])
        convolution = map_conv if name == 'triton' else map_conv_reference
        x = convolution(x, self.conv2d.weight, self.conv2d.bias)
        y = self.scan(x, gate, rates, name)
        return self.out_proj(y.permute(0, 3, 1, 2) if self.channel_first else y)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map to what is scanned, (B, H, W, D), and the gate, if there is one."""
        if self.gate and not self.channel_first and onednn.takes(x, self.in_proj):
            # two products, so that each result is dense, as the convolution wants it
            return tuple(onednn.linear(x, w, None) for w in self.in_proj.weight.chunk(2))
        x = self.in_proj(x)
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        return x.chunk(2, dim=-1) if self.gate else (x, None)

    def scan(self, x: Tensor, gate: Tensor | None, rates: Tensor, backend: str) -> Tensor:
        """Map (B, H, W, D) to the sum of its scans, normalised and under the gate."""
        fused = backend == 'triton' and not hooked(self.out_norm)
        y = self.scan_directions(x.permute(0, 3, 1, 2), rates, not fused, backend)
        if fused and len(y) == 1:
            norm = self.out_norm
            gate = gate if gate is None else gate.flatten(1, 2)
            return merge_norm(y[0], norm.weight, norm.bias, norm.eps, gate, x.dtype).view(x.shape)
        if fused:  # results of the released restore lie apart
            y = functools.reduce(torch.add, y).squeeze(1)
        return self.normalized(y.mT.unflatten(1, x.shape[1:3]), gate, x.dtype)

    def normalized(self, y: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Norm and gate of a map (B, H, W, D)."""
        y = y.to(self.out_norm.weight.dtype)  # what follows has the precision of its weights
        if self.channel_first:
            y = self.out_norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(dtype)
        else:
            y = self.out_norm(y).to(dtype)
        if gate is None:
            return y
        if onednn.takes(gate):  # new memory for a large map costs more than the product
            return F.silu(gate).mul_(y)
        return y * F.silu(gate)

    def scan_directions(self, x: Tensor, rates: Tensor, merge: bool, backend: str
                        ) -> Tensor | list[Tensor]:
        """Map (B, D, H, W) to (B, D, L), or to stacks (B, k, D, L) of them if not ``merge``."""
        plan = scan_plan(self.directions, *x.shape[-2:], x.device, restore=self.v_restore)
        return scan_directions(
            x.flatten(2), self.x_proj_weight, self.dt_projs_weight, rates, self.Ds,
            self.dt_projs_bias.flatten(), plan, merge, self.float32_scan, backend)


class LocalSS2D(SS2D):
    """Token mixer of LocalVMamba: gated SS2D with windowed directions under channel attention.

    From Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
    2403.09338), section 3.  Maps are (B, H, W, C).

    Args:
        dim: number of channels C.
        directions: K scan directions; None for all eight under learned weights, the form in which
            directions are searched.
        attention: what each direction goes through before the sum: 'channel' as in the published
            networks, 'channel-spatial' as in the paper, or 'none'.
        **options: of :class:`SS2D`.
    """

    def __init__(self, dim: int, directions: Sequence[str] | None, attention: str = 'channel',
                 **options):
        super().__init__(dim, directions=directions or DIRECTIONS, gate=True, channel_first=False,
                         **options)
        self.multi_scan = DirectionMixture(len(self.directions)) if not directions else nn.Module()
        self.multi_scan.attn = make_attention(attention, self.out_norm.normalized_shape[0])
        # The fused kernel knows this form alone; it reads its layers itself, see weight_casts.py.
        self.fused_attention = attention == 'channel'
        self.reads_itself = ['conv2d']
        if self.fused_attention:
            self.reads_itself += [
                'multi_scan.attn.global_reduce', 'multi_scan.attn.channel_select']

    def scan(self, x: Tensor, gate: Tensor, rates: Tensor, backend: str) -> Tensor:
        """Map (B, H, W, D) to the merged scans, normalised and under the gate."""
        mixture, norm = self.multi_scan, self.out_norm
        attention = mixture.attn
        searching = isinstance(mixture, DirectionMixture)
        ys = self.scan_directions(x.permute(0, 3, 1, 2), rates, False, backend)
        if (backend == 'triton' and self.fused_attention and len(ys) == 1 and not searching
                and x.numel()
                and not torch.compiler.is_compiling() and not hooked(norm)):
            parts = attention.norm, attention.global_reduce, attention.channel_select
            if not (hooked(attention) or any(map(hooked, parts))):
                return attend_norm(
                    ys[0], Attention(*(p for part in parts for p in registered(part))),
                    parts[0].eps, norm.weight, norm.bias, norm.eps, gate.flatten(1, 2), x.dtype
                ).view(x.shape)
        ys = [y.to(norm.weight.dtype) for y in ys]
        y = merge_directions(ys, attention, mixture() if searching else None,
                             compiled=backend == 'cpp')
        return self.normalized(y.unflatten(1, x.shape[1:3]), gate, x.dtype)
