"""Gradient checkpointing that leaves no trace."""
from __future__ import annotations

import contextlib

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ['recomputed']


def recomputed(module: nn.Module, *inputs) -> Tensor:
    """Run the module, keeping only its inputs for the backward pass, which runs it again.

    The second run draws the same random numbers and does not count in the running statistics of
    BatchNorm, so the result is that of the plain call in every respect but memory and time.
    """
    return checkpoint(module, *inputs, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)))


@contextlib.contextmanager
def _statistics_kept(module: nn.Module):
    norms = [m for m in module.modules()
             if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.  # running statistics are then multiplied by 1
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
