"""Gradient checkpointing that leaves no trace."""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ['recomputed']


def recomputed(module: nn.Module, x: Tensor, *more, draws: bool = True) -> Tensor:
    """Run the module, keeping only its inputs for the backward pass, which runs it again.

    The second run draws the same random numbers and does not count in the running statistics of
    BatchNorm, so the result is that of the plain call in every respect but memory and time.

    Args:
        module: gets all that follows.
        x: its first input.
        more: further ones.
        draws: whether the module draws random numbers. If not, nobody asks for the generators'
            states while a CUDA graph is recorded, where PyTorch 2.4 refuses to tell them.
    """
    return checkpoint(module, x, *more, use_reentrant=False,
                      preserve_rng_state=draws or not _recording(x),
                      context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)))


def _recording(x: Tensor) -> bool:
    return (not torch.compiler.is_compiling() and x.is_cuda
            and torch.cuda.is_current_stream_capturing())


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
