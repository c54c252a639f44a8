"""Batches of one image, where a model normalizes over the batch, odd ones, and batches too large.

A normalization over the batch needs two values per channel. One image has many, except behind a
pooling to 1x1, which every full-size segmentor's head and many classifiers have.
"""
from __future__ import annotations

import inspect

import torch
from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .explanations import SINGLE_VALUE_ADVICE

__all__ = ['FEW', 'check_pairs', 'check_single_images', 'few_images_note',
           'out_of_memory_advice', 'pooled_norms']

FEW = 8  # images; statistics over fewer are noisy


def check_single_images(runner) -> None:
    """Raise UserError if training would normalize a single value.

    Only what is certain counts: a pooling to 1x1 with a batch normalization in the same sequence of
    layers, which training does not freeze. Anything else shows at its first batch.
    """
    loader = runner.train_loop.dataloader
    size = getattr(loader.batch_sampler, 'batch_size', None)
    names = pooled_norms(runner.model) if size else []
    if names and size == 1:
        raise UserError(
            f'train_dataloader.batch_size is 1 on each process, but {names[0]} normalizes over the '
            f'batch behind a pooling to one value per image. {SINGLE_VALUE_ADVICE}')
    if names and _last_batch(runner.train_loop) == 1:
        raise UserError(
            f'{len(loader.batch_sampler.sampler)} training images in batches of {size} leave a '
            f'last batch of one, but {names[0]} normalizes over the batch behind a pooling to one '
            'value per image. Add --cfg-options train_dataloader.drop_last=True, or take another '
            'batch size.')


def check_pairs(runner) -> None:
    """Raise UserError if a classifier would mix the images of an odd batch in pairs."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    loader = runner.train_loop.dataloader
    size = getattr(loader.batch_sampler, 'batch_size', None)
    if not size or getattr(model, 'mixing', None) is None:
        return
    pairs = 'but model.mixing takes images in pairs'
    if size % 2:
        raise UserError(
            f'train_dataloader.batch_size is {size} on each process, {pairs}. Set an even number, '
            f'such as --cfg-options train_dataloader.batch_size={size + 1}, or model.mixing=None.')
    last = _last_batch(runner.train_loop)
    if last is not None and last % 2:
        raise UserError(
            f'{len(loader.batch_sampler.sampler)} training images in batches of {size} leave a '
            f'last batch of {last}, {pairs}. Add --cfg-options train_dataloader.drop_last=True.')


def _last_batch(loop) -> int | None:
    """Images in the last batch of a pass through the data; None if there is none, or unknown."""
    batches = loop.dataloader.batch_sampler
    if type(batches).__name__ not in ('BatchSampler', 'AspectRatioBatchSampler'):
        return None
    passes = isinstance(loop, EpochBasedTrainLoop) or loop.max_iters >= len(loop.dataloader)
    endless = hasattr(batches.sampler, '_infinite_indices')  # mmengine's and mmdet's
    if not passes or endless or batches.drop_last:
        return None
    return len(batches.sampler) % batches.batch_size or batches.batch_size


def pooled_norms(model: nn.Module) -> list[str]:
    """Names of the batch normalizations that see one value per image while training.

    One over several processes (SyncBN) sees those of all of them. Puts the model into training
    mode, as the loop does: a model may keep parts of itself frozen there.
    """
    model = model.module if is_model_wrapper(model) else model
    model.train()
    names = []
    for path, part in model.named_modules():
        pooled = False
        for name, layer in part.named_children() if isinstance(part, nn.Sequential) else ():
            pooled |= isinstance(layer, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)) and (
                layer.output_size in (1, (1, 1)))
            if pooled:
                names += [f'model.{path}.{name}.{inner}'.rstrip('.')
                          for inner, norm in layer.named_modules() if _needs_two(norm)]
    return names


def _needs_two(layer: nn.Module) -> bool:
    together = isinstance(layer, nn.SyncBatchNorm) and get_world_size() > 1
    return isinstance(layer, _BatchNorm) and layer.training and not together


def few_images_note(runner) -> str | None:
    """What to say about BatchNorm that trains on few images; None if there is nothing to say."""
    batch = getattr(runner.train_loop.dataloader.batch_sampler, 'batch_size', None) or FEW
    if batch >= FEW or any(type(hook).__name__ == 'FrozenNormsHook' for hook in runner._hooks):
        return None
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.train()
    names = [name for name, layer in model.named_modules() if _needs_two(layer)]
    if not names:
        return None
    return (f'{len(names)} BatchNorm layer(s), of which model.{names[0]} is the first, compute '
            f'over the {batch} image(s) of a process. So few make noisy statistics: --norms auto '
            'chooses what suits them.')


def _same_rate(cfg) -> str:
    """Those options scale the rate by a rule, which this run has not asked for."""
    rate = (cfg.optim_wrapper.get('optimizer') or {}).get('lr')
    scaled = (cfg.get('auto_scale_lr') or {}).get('enable')
    return f' --lr {rate:g}' if isinstance(rate, float) and not scaled else ''


def out_of_memory_advice(error: torch.cuda.OutOfMemoryError, runner) -> str:
    """What to try when a GPU's memory does not suffice: only what is not in use already."""
    loader, wrapper = runner.train_loop.dataloader, runner.optim_wrapper
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    size = getattr(loader.batch_sampler, 'batch_size', None) or 1
    least = 2 if pooled_norms(model) else 1
    ways = []
    if size > least:
        counts = 2 * getattr(wrapper, '_accumulative_counts', 1)
        ways.append('smaller batches, --batch '
                    f'{max(least, size // 2)} --accumulate {counts}{_same_rate(runner.cfg)}')
    if getattr(wrapper, 'cast_dtype', None) is None:
        ways.append('mixed precision, --amp')
    settings = runner.cfg.model.get('backbone') or {}
    if not settings.get('with_cp') and 'with_cp' in inspect.signature(
            type(getattr(model, 'backbone', model))).parameters:
        ways.append('gradient checkpointing, --cfg-options model.backbone.with_cp=True')
    ways += ['smaller images, --image-size N', 'a smaller model']
    limit = (f'\nBatches of less than {least} are not possible: parts of the model normalize over '
             'the batch.') if least > 1 else ''
    return (f'The GPU is out of memory. {str(error).splitlines()[0]}\nWhat helps: '
            f'{"; ".join(ways)}.{limit}')
