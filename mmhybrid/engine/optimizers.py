"""Optimizers that neither PyTorch nor mmengine has."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UserError
from ..registry import OPTIMIZERS

__all__ = ['lamb']


@OPTIMIZERS.register_module(name='Lamb')
def lamb(params, lr: float, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-6,
         weight_decay: float = 0.01, max_grad_norm: float | None = 1.0) -> torch.optim.Optimizer:
    """LAMB of timm.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients and their squares.
        eps: added to the root of the latter.
        weight_decay: share of the weights that is added to the update.
        max_grad_norm: norm to which gradients of all parameters are cut together; None for none.
    """
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise UserError(f'The optimizer LAMB comes from timm, which cannot be imported ({error}). '
                        'Run: pip install timm') from error
    return Lamb(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay,
                max_grad_norm=max_grad_norm)
