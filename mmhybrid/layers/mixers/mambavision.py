"""The mixer of MambaVision: half scan, half convolution.

Legend: B batch (windows), L tokens, C channels, E = C / 2, N state size, R rank of the step.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops import mambavision_mixer, selective_scan
from mmhybrid.ops.precision import at_least_float32
from mmhybrid.ops.selective_scan import choose_backend

from ..linear import token_linear
from ..scan_init import init_decay_, init_step_bias_

__all__ = ['BRANCHES', 'MambaVisionMixer']

#: What the second half of the channels becomes.
BRANCHES = ('concat', 'gate', 'linear-gate', 'none')


class MambaVisionMixer(nn.Module):
    """Half scan, half convolution, joined by a linear layer.

    The channels are split in two: one half goes through a short convolution and a selective scan,
    the other through a short convolution only; both are concatenated and projected.  From
    Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone" (2024),
    section 3.2.

    Args:
        dim: C, token width; even.
        state_dim: N, states per scanned channel.
        conv_size: kernel of the short convolutions; odd, zero padded, not causal.
        dt_rank: R; None for ceil(C / 16).
        backend: scan implementation, see :func:`mmhybrid.ops.selective_scan`.
        fused: True for the kernels of :func:`mmhybrid.ops.mambavision_mixer.fused_mixer`, which
            need a GPU and Triton, False for ordinary layers around the scan, 'auto' for the kernels
            whenever the scan would run in Triton anyway; :meth:`path` tells.  Both compute the same
            from the same parameters; the kernels can be differentiated only once.  They know the
            mixer with its own ``causal`` and ``branch`` only, any other is plain.
        lean: whether the kernels keep about 4 instead of 7 bytes per token and channel (bfloat16)
            for the backward pass and compute more of it again.
        causal: whether the convolution before the scan sees no later token, as in Mamba.
        branch: what the second half of the channels becomes: 'concat' as above; 'gate' for a factor
            of the scan's result instead; 'linear-gate' for Mamba's own gate, without convolution;
            'none' for a mixer of one half.

    Raises:
        ValueError: if ``dim`` is odd, ``fused`` or ``branch`` is none of its values, or ``fused``
            contradicts the backend or the form.
    """

    def __init__(self, dim: int, state_dim: int = 8, conv_size: int = 3,
                 dt_rank: int | None = None, backend: str = 'auto', fused: bool | str = 'auto',
                 lean: bool = False, causal: bool = False, branch: str = 'concat'):
        super().__init__()
        if dim % 2:
            raise ValueError(f'got {dim} channels, expected an even number because one half of '
                             'them is scanned; change the width of the model')
        if fused not in (True, False, 'auto'):
            raise ValueError(f"got fused={fused!r}, expected True, False or 'auto'")
        if fused is True and backend not in ('auto', 'triton'):
            raise ValueError(f"got fused=True with backend='{backend}', but the fused mixer brings "
                             "its own scan; use backend='auto', or fused=False")
        if branch not in BRANCHES:
            raise ValueError(f"got branch={branch!r}, expected one of {', '.join(BRANCHES)}")
        # the form that the kernels are written for
        self.as_published = branch == 'concat' and not causal
        if fused is True and not self.as_published:
            raise ValueError(f"got fused=True with causal={causal} and branch='{branch}', but the "
                             "kernels are written for causal=False and branch='concat'; use "
                             "fused='auto'")
        half = dim // 2
        self.causal, self.branch = causal, branch
        self.state_dim = state_dim
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.backend = backend
        self.fused = fused
        self.lean = lean

        self.A_log = nn.Parameter(torch.empty(half, state_dim))
        self.D = nn.Parameter(torch.empty(half))
        self.in_proj = token_linear(dim, half if branch == 'none' else dim, bias=False)
        self.x_proj = token_linear(half, self.dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, half)
        self.out_proj = token_linear(dim if branch == 'concat' else half, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, conv_size, groups=half, bias=False)
        self.reads_itself = ['dt_proj.bias', 'conv1d_x']  # in float32, see weight_casts.py
        if branch in ('concat', 'gate'):
            self.conv1d_z = nn.Conv1d(half, half, conv_size, groups=half, bias=False)
            self.reads_itself.append('conv1d_z')
        # read by optimizer constructors that spare the dynamics of the state from decay
        self.A_log._no_weight_decay = True
        self.D._no_weight_decay = True
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, step_min: float = 1e-3, step_max: float = 1e-1,
                              step_floor: float = 1e-4) -> None:
        """Initialise the scan as Mamba does, on the step that is really taken.

        The bias b of ``dt_proj`` enters the step twice, so it is softplus(2 b), not softplus(b),
        that is drawn log-uniformly from [step_min, step_max] (Gu and Dao, "Mamba" (2023),
        section 3.6).
        """
        init_decay_(self.A_log)
        nn.init.ones_(self.D)
        bound = self.dt_rank ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_step_bias_(self.dt_proj.bias, step_min, step_max, step_floor).div_(2)

    def path(self, x: Tensor) -> str:
        """Which way the tokens will go: 'fused' or 'plain'.

        Raises:
            RuntimeError: if the fused way was asked for and cannot be gone, with the reason.
        """
        # the meta device, where only shapes are tracked, knows no autocast
        if self.fused is False or not self.as_published or x.numel() == 0 or x.is_meta:
            return 'plain'
        state = self.state_dim
        if self.fused == 'auto' and choose_backend(
                self.backend, x.device, torch.float32, state) != 'triton':
            return 'plain'
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        reason = mambavision_mixer.unsupported_reason(x.device, dtype, state)
        if reason and self.fused is True:
            raise RuntimeError(f'MambaVisionMixer was asked for fused=True, but {reason}')
        return 'plain' if reason else 'fused'

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, L, C) in and out."""
        if self.fused is False or not self.as_published:
            return self._forward_plain(x)
        dt_proj = self.dt_proj
        tensors = (
            x, self.in_proj.weight, self.conv1d_x.weight, self.conv1d_z.weight, self.x_proj.weight,
            dt_proj.weight, dt_proj.bias, self.A_log, self.D, self.out_proj.weight)
        ready = mambavision_mixer.prepared(tensors, self.lean, self.backend, self.fused)
        known = ready is not None and ready.call is not None  # has been asked which way it goes
        if known or self.path(x) == 'fused':
            return mambavision_mixer.mix(tensors, self.lean, ready)
        return self._forward_plain(x)

    def _forward_plain(self, x: Tensor) -> Tensor:
        R, N = self.dt_rank, self.state_dim
        u_BEL, z_BEL = self._branches(self.in_proj(x).transpose(1, 2))
        dt, B, C = torch.matmul(self.x_proj.weight, u_BEL).split([R, N, N], dim=1)
        y_BEL = selective_scan(
            u_BEL,
            torch.matmul(self.dt_proj.weight, dt),
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            D=self.D,
            # Published weights need the bias twice: once from the projection, once here.
            delta_bias=2 * self.dt_proj.bias,
            delta_softplus=True,
            backend=self.backend)
        if self.branch == 'concat':
            y_BEL = torch.cat([y_BEL, z_BEL], dim=1)
        elif self.branch != 'none':
            y_BEL = y_BEL * z_BEL
        return self.out_proj(y_BEL.transpose(1, 2))

    def _branches(self, xz_BCL: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is scanned, and what joins the result."""
        E, weight = self.D.shape[0], self.conv1d_x.weight
        # A number, not a size of a tensor, which torch.jit.trace would follow.
        size = self.conv1d_x.kernel_size[0]
        if self.as_published:
            # Both halves in one convolution: channels are independent in it.
            weight = torch.cat([weight, self.conv1d_z.weight])
            xz_BCL = F.silu(F.conv1d(xz_BCL, weight, padding=size // 2, groups=2 * E))
            return xz_BCL.split(E, dim=1)
        u_BEL, z_BEL = xz_BCL[:, :E], xz_BCL[:, E:]
        if self.causal:
            u_BEL = F.conv1d(F.pad(u_BEL, (size - 1, 0)), weight, groups=E)
        else:
            u_BEL = F.conv1d(u_BEL, weight, padding=size // 2, groups=E)
        if self.branch in ('concat', 'gate'):
            z_BEL = F.conv1d(z_BEL, self.conv1d_z.weight, padding=size // 2, groups=E)
        return F.silu(u_BEL), None if self.branch == 'none' else F.silu(z_BEL)
