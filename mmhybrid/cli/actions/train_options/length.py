"""``--epochs``: another length of the training, in which schedules keep their shape."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mmengine.registry import DATASETS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmhybrid.engine.loop_check import train_loop
from mmhybrid.errors import UserError

__all__ = ['apply_epochs']

# Settings of schedules: moments, and lengths that count from ``begin``.
MOMENTS, LENGTHS = ('milestones',), ('T_max', 'step_size', 'total_iters', 'total_steps', 'periods')
# Of hooks, by the unit they count in.
OF_HOOKS = dict(epoch=('switch_epoch', 'begin_epoch'), iter=('switch_iter', 'begin_iter'))


def apply_epochs(cfg, epochs: int, processes: int) -> list[str]:
    """Let a training last ``epochs`` passes through its data.

    Schedules, intervals of iterations and moments at which hooks do something move with the end;
    warm-ups become shorter with it and never longer.

    Args:
        cfg: the config, changed in place. With loops that count iterations, its data set is built
            to see how many images it has.
        epochs: to train.
        processes: that share the images.

    Returns:
        Notes for the log.

    Raises:
        UserError: for a loop of another kind, or data without a length.
    """
    kind = train_loop(cfg.train_cfg, cfg.get('default_scope'))
    if kind is not None and issubclass(kind, EpochBasedTrainLoop):
        unit, key, new = 'epoch', 'max_epochs', epochs
        how = ''
    elif kind is not None and issubclass(kind, IterBasedTrainLoop):
        unit, key = 'iter', 'max_iters'
        images, batch = _images(cfg), cfg.train_dataloader.batch_size * processes
        new = math.ceil(epochs * images / batch)
        how = f' ({images} images in batches of {batch}: {new} iterations)'
    else:
        raise UserError(f'--epochs cannot tell how train_cfg of type {cfg.train_cfg.get("type")} '
                        'counts. Set its length with --cfg-options train_cfg.NAME=N, and '
                        'param_scheduler with it.')
    old = cfg.train_cfg.get(key)
    cfg.train_cfg[key] = new
    if not old:
        return [f'--epochs {epochs}{how}: train_cfg.{key} is {new}, and the config had none that '
                'its schedules could be compared with; they stay as they are.']
    _set_intervals(cfg, unit, old, new)
    for group in _groups(cfg.get('param_scheduler')):
        _stretch(group, unit, old, new)
    return [f'--epochs {epochs}{how}: train_cfg.{key} is {new} instead of {old}; schedules and '
            'intervals changed in proportion, and a warm-up does not grow.']


def _images(cfg) -> int:
    dataset = cfg.train_dataloader.get('dataset')
    try:
        return len(DATASETS.build(dataset) if isinstance(dataset, dict) else dataset)
    except TypeError as error:
        if 'has no len()' not in str(error):
            raise
        raise UserError('--epochs needs to know how many images train_dataloader.dataset has, and '
                        'it does not tell its length. Use --cfg-options train_cfg.max_iters=N.'
                        ) from error


def _set_intervals(cfg, unit: str, old: int, new: int) -> None:
    def interval(value):
        if value == old:
            return new
        return max(1, min(value, new) if unit == 'epoch' else round(value * new / old))

    loop = cfg.train_cfg
    if loop.get('val_interval'):
        loop.val_interval = interval(loop.val_interval)
    if loop.get('val_begin'):
        loop.val_begin = round(loop.val_begin * new / old)
    if loop.get('dynamic_intervals'):
        loop.dynamic_intervals = [(round(start * new / old), interval(every))
                                  for start, every in loop.dynamic_intervals]
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if saving.get('interval', -1) > 0 and saving.get('by_epoch', True) == (unit == 'epoch'):
        saving.interval = interval(saving.interval)
    for hook in cfg.get('custom_hooks') or []:
        for key in OF_HOOKS[unit]:
            if isinstance(hook, dict) and hook.get(key):
                hook[key] = round(hook[key] * new / old)


# --- schedules ------------------------------------------------------------------------------------

def _groups(schedules) -> Iterator[list[dict]]:
    """Schedules that follow one another; several optimizers have several such lists."""
    if isinstance(schedules, dict) and 'type' not in schedules:
        for each in schedules.values():
            yield from _groups(each)
    elif schedules:
        group = schedules if isinstance(schedules, (list, tuple)) else [schedules]
        yield [each for each in group if isinstance(each, dict)]


def _stretch(schedules: list[dict], unit: str, old: int, new: int) -> None:
    for own in ('epoch', 'iter'):
        group = [each for each in schedules if each.get('by_epoch', True) == (own == 'epoch')]
        ends = [each.end for each in group if each.get('end', math.inf) < math.inf]
        # Iterations in a loop of epochs: their whole is where the last schedule ends.
        whole = old if own == unit else max(ends, default=0)
        warm = max((each.end for each in group if _warms_up(each)), default=0)
        moment = _moments(whole, whole * new / old, warm, min(1, new / old))
        for each in group:
            _move(each, moment)


def _warms_up(schedule: dict) -> bool:
    """Whether it begins the training below the full rate, which it reaches at its end."""
    kind = str(schedule.get('type')).rpartition('.')[2]
    if schedule.get('begin', 0) or schedule.get('end', math.inf) == math.inf:
        return False
    if kind.startswith('Linear'):
        return schedule.get('start_factor', 1 / 3) < schedule.get('end_factor', 1)
    if kind.startswith('Constant'):
        return schedule.get('factor', 1 / 3) < 1
    return kind.startswith('QuadraticWarmup')


def _moments(old: float, new: float, warm: float, shorter: float) -> Callable[[float], float]:
    """What a moment of the old training is in the new one."""
    kept = warm * shorter
    slope = (new - kept) / (old - warm) if old > warm else shorter

    def moment(value: float) -> float:
        return value * shorter if value <= warm else kept + (value - warm) * slope

    return moment


def _move(schedule: dict, moment: Callable[[float], float]) -> None:
    begin = schedule.get('begin', 0)
    first = round(moment(begin))

    def length(value: float) -> int:
        return max(1, round(moment(begin + value) - moment(begin)))

    for key in LENGTHS:
        value = schedule.get(key)
        if isinstance(value, (list, tuple)):
            schedule[key] = [length(each) for each in value]
        elif value is not None:
            schedule[key] = length(value)
    for key in MOMENTS:
        if schedule.get(key):
            schedule[key] = [max(1, round(moment(each))) for each in schedule[key]]
    if 'begin' in schedule:
        schedule.begin = first
    if schedule.get('end', math.inf) < math.inf:
        schedule.end = max(first + 1, round(moment(schedule.end)))
