"""What ``mmhybrid memory`` does."""
from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch.torch_version import TorchVersion

from mmhybrid.analysis.models.memory import format_proposals, proposals, step_of
from mmhybrid.analysis.models.source import checked_shape, find_model
from mmhybrid.analysis.pretended_gpu import MINIMUM_TORCH
from mmhybrid.errors import UserError

__all__ = ['predict_memory']


def predict_memory(args: argparse.Namespace) -> int:
    """Run ``mmhybrid memory``.

    Returns:
        0 if the step fits as it is configured, else 1.
    """
    if args.gpu <= 0 or (args.batch is not None and args.batch < 1):
        raise UserError(f'--gpu takes GiB above 0 and --batch at least 1 image, got --gpu '
                        f'{args.gpu:g} and --batch {args.batch}.')
    if torch.__version__ < TorchVersion('.'.join(map(str, MINIMUM_TORCH))):
        raise UserError(f'mmhybrid memory needs torch >= {".".join(map(str, MINIMUM_TORCH))} for '
                        f'its shapes, and {torch.__version__} is installed.')
    source = find_model(args.config, args.cfg_options)
    size = checked_shape(args.size) if args.size else None
    if args.fsdp is not None and args.fsdp < 2:
        raise UserError(f'--fsdp takes the number of processes, at least 2, got {args.fsdp}.')
    step = replace(step_of(source, args.batch, size, args.dtype), ranks=args.fsdp or 1)
    found = proposals(source, step, args.gpu)
    print(format_proposals(source.name, found, args.gpu))
    return int(found[0].largest < step.batch)
