"""``--batch auto``: the largest batch that fits, found once.

On a GPU steps are tried on made-up images of the largest size that the pipeline makes; without one,
or for models that made-up annotations do not fit, memory is predicted from shapes. What was found
is kept in ``mmhybrid/batches.json`` of the user's cache folder.
"""
from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import math
import os
import os.path as osp
from collections.abc import Callable

import torch
import torch.distributed as dist
from mmengine.dist import all_reduce, init_dist
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from torch.torch_version import TorchVersion

from mmhybrid.analysis.models.memory import (
    GIB,
    Step,
    predict,
    states_per_value,
    step_of,
    usable,
)
from mmhybrid.analysis.models.source import ModelSource, build_model
from mmhybrid.analysis.models.synthetic import synthetic_batch
from mmhybrid.analysis.pretended_gpu import MINIMUM_TORCH
from mmhybrid.compat.whole_checkpoints import write_aside
from mmhybrid.engine.small_batches import pooled_norms
from mmhybrid.errors import UserError

__all__ = ['available_memory', 'largest_batch', 'largest_that', 'predicted_batch']

SHARE = 0.9  # of a GPU's memory; allocators need some for pieces that fit nothing
OF_RAM = 0.5  # the prediction is one of a GPU's kernels, and others work on this machine
BEYOND = 4  # times the batch that the learning rate was chosen for; nobody knows a rate further out


def largest_batch(cfg, processes: int) -> tuple[int, list[str]]:
    """Images per process that fit, and what to say about the number.

    Not more than four times the batch that the learning rate was chosen for, nor than there are
    images. The same for all processes.

    Raises:
        UserError: not even one image fits, or the pipeline names no size.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ''
    source = ModelSource('--batch auto', cfg.model, cfg)
    step = step_of(source, 1)
    limit, why = _limit(cfg, processes)
    key = _key(cfg, step, device, limit)
    found, how = _remembered(key), f'found before and kept in {_file()}'
    if found is None:
        if device and _can_be_tried(cfg):
            found, how = _try(source, step, limit), f'tried on {device}'
            gc.collect()
            torch.cuda.empty_cache()
        else:
            beside = int(os.environ.get('LOCAL_WORLD_SIZE', processes))  # share this machine
            memory = torch.cuda.mem_get_info()[1] if device else (
                available_memory() * OF_RAM / beside)
            found = predicted_batch(source, step, usable(memory / GIB) if device else memory, limit)
            how = f'predicted from shapes for {memory / GIB:.1f} GiB'
            how += '' if device else f", a process's part of {OF_RAM:.0%} of what is free"
        _remember(key, found)
    found = _same_everywhere(cfg, found, processes)
    least = 'not even one image of'
    if not found:
        raise UserError(f'--batch auto: {least} {step.size[0]} x {step.size[1]} fits ({how}). Take '
                        'smaller images, --image-size N, or a smaller model.')
    bound = f'; it could be more, but {why}' if found == limit else ''
    return found, [f'--batch auto: {found} images of {step.size[0]} x {step.size[1]} on each '
                   f'process ({how}{bound}).']


def _limit(cfg, processes: int) -> tuple[int, str]:
    """The largest batch that makes sense, and why."""
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    base = base or cfg.train_dataloader.get('batch_size', 1) * processes
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    limits = [(max(1, BEYOND * base // (processes * accumulated)),
               f'a step has {BEYOND} times the {base} images that the learning rate was chosen for '
               'then')]
    dataset = cfg.train_dataloader.dataset
    with contextlib.suppress(TypeError):  # data without a length
        images = len(DATASETS.build(dataset) if isinstance(dataset, dict) else dataset)
        limits.append((max(1, images // processes), f'there are {images} images'))
    return min(limits)


# --- without a trial ------------------------------------------------------------------------------

def predicted_batch(source: ModelSource, step: Step, limit: float, most: int) -> int:
    """The largest batch whose predicted peak fits.

    Args:
        source: the model.
        step: of one image.
        limit: bytes.
        most: images.

    Raises:
        UserError: PyTorch is too old to follow shapes.
    """
    if torch.__version__ < TorchVersion('.'.join(map(str, MINIMUM_TORCH))):
        raise UserError(f'--batch auto predicts memory, which needs torch >= '
                        f'{".".join(map(str, MINIMUM_TORCH))}; {torch.__version__} is installed. '
                        'Give a number, --batch N.')
    one, two = (predict(source, step.with_batch(count)).peak.bytes for count in (2, 3))
    each = max(two - one, 1)  # normalization over a batch refuses one image; memory grows evenly
    return int(max(0, min(most, 2 + (limit - one) // each)))


def available_memory() -> int:
    """Bytes that this process can still take of the machine's memory."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open('/proc/meminfo', encoding='ascii') as file:
            line = next(each for each in file if each.startswith('MemAvailable'))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is not a number: no limit
        folder = '/sys/fs/cgroup'
        with open(f'{folder}/memory.max', encoding='ascii') as file:
            most = int(file.read())
        with open(f'{folder}/memory.current', encoding='ascii') as file:
            found.append(max(0, most - int(file.read())))
    if not found:
        found.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
    return min(found)


# --- with one -------------------------------------------------------------------------------------

def largest_that(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, None  # what fits, and what is known not to
    while (high or most + 1) - low > 1:
        number = (low + high) // 2 if high else min(most, max(1, 2 * low))
        low, high = (number, high) if fits(number) else (low, number)
    return low


def _can_be_tried(cfg) -> bool:
    """Whether there are made-up annotations for the model."""
    head = cfg.model.get('roi_head') or cfg.model
    return bool(cfg.model.get('decode_head') or head.get('bbox_head'))


def _try(source: ModelSource, step: Step, limit: int) -> int:
    model = build_model(source, 'cuda')
    least = 2 if pooled_norms(model) else 1
    settings = copy.deepcopy(source.config.optim_wrapper)
    settings.optimizer = dict(type='SGD', lr=0.0)
    for key in ('constructor', 'paramwise_cfg'):  # rules for an optimizer with weight decay
        settings.pop(key, None)
    wrapper = build_optim_wrapper(model, settings)
    # A step that a loss scaler leaves out makes no states, so they are here from the start.
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [torch.zeros_like(p) for p in trained for _ in range(states_per_value(source.config))]
    if any('EMA' in str(hook.get('type')) for hook in source.config.get('custom_hooks') or ()):
        kept += [x.detach().clone() for x in model.state_dict().values()]
    torch.cuda.set_per_process_memory_fraction(SHARE)

    def fits(batch: int) -> bool:
        try:
            for _ in range(2):  # gradients of the first are there while the second begins
                model.train_step(synthetic_batch(model, step.size, batch), wrapper)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            wrapper.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
        return True

    try:
        found = largest_that(lambda batch: batch < least or fits(batch), max(limit, least))
        return found if found >= least else 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        kept.clear()


def _same_everywhere(cfg, found: int, processes: int) -> int:
    if processes == 1:
        return found
    if not dist.is_initialized():
        init_dist(cfg.launcher, **(cfg.get('env_cfg') or {}).get('dist_cfg', {}))
    number = torch.tensor(found)
    all_reduce(number, 'min')
    return int(number)


# --- found once -----------------------------------------------------------------------------------

def _key(cfg, step: Step, device: str, limit: int) -> str:
    """What decides about the number."""
    parts = [cfg.model.to_dict(), cfg.optim_wrapper.to_dict(), step, device, limit,
             torch.__version__, cfg.get('env_cfg', {}).get('cudnn_benchmark'),
             [str(hook.get('type')) for hook in cfg.get('custom_hooks') or ()
              if isinstance(hook, dict)]]
    # Free memory of a machine changes all the time: what half of it allows is another number then.
    parts.append(torch.cuda.mem_get_info()[1] if device else
                 round(math.log2(max(1, available_memory()))))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _file() -> str:
    folder = os.environ.get('XDG_CACHE_HOME', '')
    folder = folder if osp.isabs(folder) else osp.expanduser('~/.cache')
    return osp.join(folder, 'mmhybrid', 'batches.json')


def _table() -> dict[str, int]:
    try:
        with open(_file(), encoding='utf-8') as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items()
            if isinstance(value, int) and value > 0} if isinstance(found, dict) else {}


def _remembered(key: str) -> int | None:
    return _table().get(key)


def _remember(key: str, found: int) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the search again
        write_aside(_file(), json.dumps({**_table(), key: found}, indent=1).encode())
