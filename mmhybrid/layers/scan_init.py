"""Initial values of a selective scan (Gu and Dao, "Mamba" (2023), section 3.6)."""
from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ['init_decay_', 'init_step_bias_']


@torch.no_grad()
def init_decay_(A_log: Tensor) -> Tensor:
    """Fill (..., N) so that A = -exp(A_log) = -(1, ..., N) in every row."""
    states = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(states.log().expand_as(A_log))


@torch.no_grad()
def init_step_bias_(bias: Tensor, step_min: float = 1e-3, step_max: float = 1e-1,
                    step_floor: float = 1e-4) -> Tensor:
    """Fill with b such that softplus(b) is log-uniform in [step_min, step_max]."""
    step = torch.empty_like(bias, dtype=torch.float32)
    step.uniform_(math.log(step_min), math.log(step_max)).exp_().clamp_(min=step_floor)
    # inverse of softplus, written so that it is exact for small steps
    return bias.copy_(step + torch.log(-torch.expm1(-step)))
