"""Building everything from the config before a run starts, and saying what does not build.

mmengine builds the model when the runner is made, but loops, data sets, optimizer and schedules
only inside ``runner.train()``, where mistakes of the config look like faults of the training.
"""
from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.runner import Runner

from ..errors import UserError
from .explanations import explain

__all__ = ['LATE', 'building', 'prepare_training']

ERRORS = (TypeError, ValueError, LookupError, ImportError, AssertionError, AttributeError,
          RuntimeError, OSError, ArithmeticError)
# Steps of the runner, and the settings that they read.
STEPS = dict(
    setup_env='env_cfg', set_randomness='randomness', build_log_processor='log_processor',
    build_logger='log_level', build_visualizer='visualizer', build_model='model',
    wrap_model='model_wrapper_cfg', register_default_hooks='default_hooks',
    register_custom_hooks='custom_hooks', build_train_loop='train_cfg',
    build_optim_wrapper='optim_wrapper', scale_lr='auto_scale_lr',
    build_param_scheduler='param_scheduler', build_val_loop='val_cfg', build_test_loop='test_cfg',
    build_evaluator='val_evaluator or test_evaluator', _init_model_weights='init_cfg in model',
    turn_on_activation_checkpointing='activation_checkpointing')
# What runner.train() does before it trains and that cannot be done earlier.
LATE = ('_init_model_weights', 'turn_on_activation_checkpointing')
BUILDERS = ('build_from_cfg', 'build_model_from_cfg', 'build_scheduler_from_cfg')


def prepare_training(runner: Runner) -> None:
    """Build what ``runner.train()`` would build first, in its order."""
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    runner.auto_scale_lr = None  # done: a second time would scale what is scaled
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    if runner._val_loop is not None:
        runner._val_loop = runner.build_val_loop(runner._val_loop)


@contextmanager
def building(config: str, cfg, steps: tuple[str, ...] = ()):
    """Turn errors of the enclosed building into a UserError that names the setting.

    Args:
        config: path of the config, for the message.
        cfg: the config that things are built from.
        steps: names of functions; errors from elsewhere are not those of building.
    """
    try:
        yield
    except ERRORS as error:
        inside = not steps or set(steps) & set(_functions(error))
        if not inside or explain(error) is not None or 'CUDA' in str(error):
            raise
        raise UserError(f'{config} cannot be built. {_told(cfg, error)}\n'
                        '(--traceback shows where)') from error


def _told(cfg, error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    node = _built(error)
    place = _place(cfg, node, _functions(error)) if node is not None else None
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        # The class may hand its settings on to its base, which is the one that complains.
        paths = [path for path, each in _groups(cfg) if unknown[1] in each]
        if place is not None and unknown[1] in node:
            paths = [place]
        if paths:
            kind = re.match(r'(\w+)\.__init__\(\)', text)
            taker = kind[1] if kind else (node or {}).get('type', 'what it is for')
            return f'{paths[0]}.{unknown[1]}: {taker} takes no such setting ({text}).'
    absent = re.search(r'^(\S+) is not in the .+ registry', text)
    if absent:
        paths = [path for path, each in _groups(cfg) if str(each.get('type')) == absent[1]]
        hint = ('It comes with the package bitsandbytes: pip install bitsandbytes'
                if absent[1].endswith('8bit') else
                'Is the name right, and is its module in custom_imports?')
        return (f'{f"{paths[0]}.type" if paths else "A type"} is {absent[1]!r}, which is not '
                f'registered. {hint}')
    if place is None:
        place = next((STEPS[name] for name in reversed(_functions(error)) if name in STEPS), None)
        return f'{f"{place}: " if place else ""}{type(error).__name__}: {text}'
    return f'{place} (type {node.get("type")}): {type(error).__name__}: {text}'


def _functions(error: Exception) -> list[str]:
    """Names of the functions that the error came through."""
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]


def _built(error: Exception) -> dict | None:
    """The settings of what was being built, the innermost."""
    nodes = [frame.f_locals.get('cfg') for frame, _ in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_name in BUILDERS]
    return next((node for node in reversed(nodes) if isinstance(node, dict)), None)


def _groups(node, path: str = '') -> Iterator[tuple[str, dict]]:
    """Yield all groups of settings with their dotted names."""
    if isinstance(node, dict) or hasattr(node, '_cfg_dict'):
        if path:
            yield path, node
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return
    for key, value in items:
        yield from _groups(value, f'{path}.{key}' if path else str(key))


def _place(cfg, node: dict, functions: list[str]) -> str | None:
    """Where in the config a group stands; building may have added to it or taken from it."""
    split = next((name for name in ('train', 'val', 'test') if f'build_{name}_loop' in functions),
                 'model')
    alike = [(sum(each.get(key) == value for key, value in node.items()), path.startswith(split),
              path) for path, each in _groups(cfg) if each.get('type', 0) == node.get('type')]
    return max(alike)[2] if alike else None
