"""Checks of loops and data loaders: numbers that cannot be, and loops that would never end.

mmengine takes any number of epochs and any interval, and finds out while it trains: a division by
zero, a run without an iteration, or one epoch that has no end.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, LOOPS, OPTIMIZERS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmhybrid.spelling import did_you_mean, nearest_few

from ..errors import UserError
from ..registry import find_type

__all__ = ['check_loops', 'class_of', 'train_loop']

# mmdet's, which yield indices without end and share no base class with mmengine's.
ENDLESS = ('InfiniteSampler', 'MultiSourceSampler', 'GroupMultiSourceSampler')
# Settings of a data loader that only mean something where there are worker processes.
OF_WORKERS = ('prefetch_factor', 'timeout', 'multiprocessing_context')


def check_loops(cfg, splits) -> list[str]:
    """Check the settings of the loops, the data loaders, the optimizer's numbers and the intervals.

    Args:
        cfg: the config. Where a data loader has ``num_workers=0``, what needs workers is switched
            off.
        splits: which of train, val and test the run has.

    Returns:
        Notes on what was switched off, for the log.

    Raises:
        UserError: that names the setting, its value and what is expected.
    """
    scope, notes = cfg.get('default_scope'), []
    if 'train' in splits:
        _check_train_cfg(cfg.train_cfg)
        _check_optimizer(cfg.optim_wrapper, scope)
        _check_hooks(cfg.get('default_hooks') or {})
    for split in splits:
        key = f'{split}_dataloader'
        for name, loader in _named(cfg.get(key), key):
            notes += _check_loader(loader, name)
            _check_end(cfg, split, loader, name, scope)
    return notes


def _named(node, name: str) -> Iterator[tuple[str, dict]]:
    """Settings and their names; several stand in a list."""
    if isinstance(node, (list, tuple)):
        for index, each in enumerate(node):
            yield from _named(each, f'{name}.{index}')
    elif isinstance(node, dict):
        yield name, node
    elif node is not None:
        raise UserError(f'{name} must be a dict of settings, got {node!r}.')


def _whole(node: dict, name: str, key: str, low: int, also: tuple = (), meaning: str = '') -> None:
    """Refuse ``node[key]`` unless it is a whole number of at least ``low``, or one of ``also``."""
    if key not in node:
        return
    value = node[key]
    if any(value is each or value == each and not isinstance(value, bool) for each in also):
        return
    # mmengine takes 12.0 for 12
    if (isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1
            or value < low):
        options = ''.join(f', or {each}' for each in also)
        raise UserError(f'{name}.{key} must be a whole number of at least {low}{options}'
                        f'{meaning}, got {value!r}.')


def _number(node: dict, name: str, key: str, above: bool = False) -> None:
    """Refuse ``node[key]`` unless it is a finite number, not negative (or positive)."""
    if key not in node:
        return
    value = node[key]
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or value < 0 or above and value == 0:
        raise UserError(f'{name}.{key} must be a finite number '
                        f'{"above 0" if above else "of at least 0"}, got {value!r}.')


# --- training -----------------------------------------------------------------------------------

def _check_train_cfg(train_cfg) -> None:
    if not isinstance(train_cfg, dict):
        raise UserError(f'train_cfg must be a dict of settings, got {train_cfg!r}.')
    if 'type' in train_cfg and 'by_epoch' in train_cfg:
        raise UserError('train_cfg has type and by_epoch, which say the same. Leave by_epoch out.')
    if train_cfg.get('type') is None and not isinstance(train_cfg.get('by_epoch'), bool):
        raise UserError('train_cfg needs type="EpochBasedTrainLoop" or type="IterBasedTrainLoop".')
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        _whole(train_cfg, 'train_cfg', key, 1,
               meaning='; val_cfg=None, val_dataloader=None and val_evaluator=None switch the '
                       'validation off' if key == 'val_interval' else '')
    _whole(train_cfg, 'train_cfg', 'val_begin', 0)
    for pair in train_cfg.get('dynamic_intervals') or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(
                isinstance(each, int) and each >= low
                for each, low in zip(pair, (0, 1), strict=True)):
            raise UserError('train_cfg.dynamic_intervals must be a list of (from, interval) with '
                            f'intervals of at least 1, got {pair!r} in it.')


def _check_optimizer(wrapper, scope) -> None:
    if not isinstance(wrapper, dict):
        raise UserError(f'optim_wrapper must be a dict of settings, got {wrapper!r}.')
    if 'optimizer' not in wrapper:  # several optimizers, each with a wrapper of its own
        return
    optimizer = wrapper['optimizer']
    if not isinstance(optimizer, dict) or 'type' not in optimizer:
        raise UserError('optim_wrapper.optimizer must be a dict with a type, such as '
                        f'dict(type="AdamW", lr=1e-4), got {optimizer!r}.')
    kind = optimizer['type']
    if isinstance(kind, str) and find_type(optimizer, OPTIMIZERS, scope) is None:
        near = nearest_few(kind, OPTIMIZERS.module_dict, 1)
        raise UserError(f'optim_wrapper.optimizer.type is {kind!r}, which is not registered.'
                        + did_you_mean(*near))
    for key in ('lr', 'weight_decay'):
        if optimizer.get(key) is not None:  # some optimizers find their own
            _number(optimizer, 'optim_wrapper.optimizer', key)
    _whole(wrapper, 'optim_wrapper', 'accumulative_counts', 1)
    clip = wrapper.get('clip_grad')
    if clip is not None:
        if not isinstance(clip, dict):
            raise UserError('optim_wrapper.clip_grad must be None or a dict such as '
                            f'dict(max_norm=1.0), got {clip!r}.')
        for key in ('max_norm', 'clip_value'):
            if clip.get(key) != math.inf:  # measures the norm and clips nothing
                _number(clip, 'optim_wrapper.clip_grad', key, above=True)


def _check_hooks(hooks: dict) -> None:
    for name, key, low, also, meaning in (
            ('logger', 'interval', 1, (), ' (iterations between two lines)'),
            ('checkpoint', 'interval', 1, (-1,), ' (only the last one)'),
            ('checkpoint', 'max_keep_ckpts', 1, (-1,), ' (all)')):
        hook = hooks.get(name)
        if isinstance(hook, dict):
            _whole(hook, f'default_hooks.{name}', key, low, also, meaning)


# --- data loaders -------------------------------------------------------------------------------

def _check_loader(loader: dict, name: str) -> list[str]:
    # A data set that yields whole batches has neither batch size nor sampler.
    _whole(loader, name, 'batch_size', 1, () if loader.get('sampler') else (None,))
    if loader.get('batch_sampler') and 'batch_size' not in loader:
        raise UserError(f'{name} has a batch_sampler but no batch_size; set {name}.batch_size.')
    _whole(loader, name, 'num_workers', 0)
    _whole(loader, name, 'prefetch_factor', 1, (None,))
    _whole(loader, name, 'num_batch_per_epoch', 1, (None,))
    _number(loader, name, 'timeout')
    for key in ('dataset', 'sampler'):
        if key not in loader:
            example = dict(dataset='dict(type="CocoDataset", ...)',
                           sampler='dict(type="DefaultSampler", shuffle=True)')[key]
            raise UserError(f'{name} has no {key}; expected for example {key}={example}.')
    for key in ('dataset', 'sampler', 'batch_sampler', 'collate_fn'):
        value = loader.get(key)
        if isinstance(value, (str, int, float)) or isinstance(value, dict) and 'type' not in value:
            raise UserError(f'{name}.{key} must be a dict with a type, got {value!r}.')
    return _without_workers(loader, name)


def _without_workers(loader: dict, name: str) -> list[str]:
    """PyTorch refuses settings of workers where there are none."""
    if loader.get('num_workers', 0):
        return []
    changed = []
    if loader.get('persistent_workers'):
        loader['persistent_workers'] = False
        changed.append('persistent_workers=False')
    for key in OF_WORKERS:
        if loader.get(key):
            del loader[key]
            changed.append(f'no {key}')
    return [f'{name}.num_workers is 0, so {" and ".join(changed)}: nothing to do without '
            'workers.'] if changed else []


def _check_end(cfg, split: str, loader: dict, name: str, scope) -> None:
    """A loop that goes through the data once needs data with an end."""
    sampler = class_of(loader.get('sampler'), DATA_SAMPLERS, scope)
    if sampler is None or not any(each is InfiniteSampler or each.__name__ in ENDLESS
                                  for each in sampler.__mro__):
        return
    kind = sampler.__name__
    if split != 'train':
        raise UserError(f'{name}.sampler is {kind}, which never ends, so neither would the '
                        f'{"validation" if split == "val" else "test"}. Use '
                        f"{name}.sampler=dict(type='DefaultSampler', shuffle=False).")
    loop = train_loop(cfg.train_cfg, scope)
    if loop is not None and issubclass(loop, EpochBasedTrainLoop):
        raise UserError(
            f'{name}.sampler is {kind}, which never ends, so neither would the first epoch of '
            f"{loop.__name__}. Use {name}.sampler=dict(type='DefaultSampler', shuffle=True), or "
            "train by iterations, train_cfg=dict(type='IterBasedTrainLoop', max_iters=N).")


def train_loop(train_cfg: dict, scope) -> type | None:
    """Class of the training loop; None if it is unknown, which building it will tell."""
    if 'type' not in train_cfg:
        return EpochBasedTrainLoop if train_cfg['by_epoch'] else IterBasedTrainLoop
    return class_of(train_cfg, LOOPS, scope)


def class_of(node, registry, scope):
    """The class that a dict names; None if it is unknown, which building it will tell."""
    kind = find_type(node, registry, scope)
    return kind if isinstance(kind, type) else None
