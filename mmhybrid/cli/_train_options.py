"""The options themselves, and what can be said against them before a config is read."""
from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable

from mmhybrid.errors import UserError

__all__ = ['AUTO', 'add_arguments', 'check_arguments', 'given']

AUTO = 'auto'
# The settings that an option is another word for.
SAME = {
    'epochs': ('train_cfg.max_epochs', 'train_cfg.max_iters'),
    'batch': ('train_dataloader.batch_size',),
    'lr': ('optim_wrapper.optimizer.lr',),
    'accumulate': ('optim_wrapper.accumulative_counts',),
    'freeze': ('model.backbone.frozen_stages',),
    'save_best': ('default_hooks.checkpoint.save_best',),
}
OPTIONS = ('epochs', 'batch', 'image_size', 'lr', 'accumulate', 'freeze', 'norms', 'ema',
           'early_stop', 'save_best', 'tensorboard', 'wandb')
# Modules that may do, and how one of them is installed.
PACKAGES = {'tensorboard': (('tensorboard', 'tensorboardX'), 'pip install tensorboard'),
            'wandb': (('wandb',), 'pip install wandb')}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    group = parser.add_argument_group(
        'instead of editing the config', 'Each sets what it says in the config and names it in '
        'the log.')
    add = group.add_argument
    add('--epochs', type=_whole(1), metavar='N',
        help='passes through the data; schedules keep their shape. Configs that count iterations '
             'get as many as N epochs have')
    add('--batch', type=_batch, metavar='N',
        help='images per step on each process, or auto: the largest that fits. The learning rate '
             'follows (see --lr)')
    add('--accumulate', type=_whole(1), metavar='N',
        help='batches per step of the optimizer. The learning rate follows (see --lr)')
    add('--lr', type=_rate, metavar='RATE',
        help="learning rate, as it is. Without it --batch and --accumulate scale the config's "
             'with the number of images per step')
    add('--image-size', type=_whole(32), metavar='PIXELS',
        help='longer side of the images of a detector, side of the crop of a segmentor; all other '
             'sizes change in proportion')
    add('--freeze', type=_whole(0), metavar='N',
        help="keep the backbone's stem and first N stages (blocks of Vim) as they are")
    add('--norms', choices=('auto', 'frozen', 'gn', 'sync'),
        help='BatchNorm in small batches: frozen keeps the statistics of the backbone, gn gives '
             'neck and heads GroupNorm, sync computes over all processes, auto chooses by the '
             "batch (default: the config's)")
    add('--ema', action='store_true', help='average the weights; evaluate and save the average')
    add('--early-stop', type=_whole(1), metavar='N',
        help='stop after N validations without improvement; keeps the best checkpoint')
    add('--save-best', nargs='?', const=AUTO, metavar='METRIC',
        help='keep the best checkpoint (by AP, mIoU or accuracy, or METRIC)')
    add('--tensorboard', action='store_true', help='also log to TensorBoard')
    add('--wandb', action='store_true', help='also log to Weights & Biases')


def _whole(low: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(
                f'expected a whole number of at least {low}, got {text!r}')
        return int(text)

    return whole


def _batch(text: str) -> int | str:
    return AUTO if text == AUTO else _whole(1)(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f'expected a finite number above 0, such as 1e-4, got {text!r}')
    return value


def given(args: argparse.Namespace) -> dict[str, int | float | str | bool]:
    """The options that were given, by name."""
    values = {name: getattr(args, name, None) for name in OPTIONS}
    return {name: value for name, value in values.items()
            if value is not None and value is not False}


def flag(name: str) -> str:
    """An option as it is written."""
    return '--' + name.replace('_', '-')


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be, before anything is read.

    Raises:
        UserError: an option and ``--cfg-options`` say the same, two options contradict each other,
            or a package is not installed.
    """
    options, changed = given(args), args.cfg_options or {}
    for name in options:
        for key in SAME.get(name, ()):
            if key in changed:
                raise UserError(f'{flag(name)} {options[name]} and --cfg-options {key}='
                                f'{changed[key]} set the same. Give one of them.')
    if 'lr' in options and args.auto_scale_lr:
        raise UserError(f'--lr {options["lr"]:g} is the learning rate as it is, and '
                        '--auto-scale-lr would change it. Give one of them.')
    if isinstance(options.get('save_best'), str) and not options['save_best'].strip():
        raise UserError('--save-best is empty. Expected the name of a metric, or nothing. (Is a '
                        'variable of the shell not set?)')
    for name, (modules, line) in PACKAGES.items():
        if name in options and not any(map(importlib.util.find_spec, modules)):
            raise UserError(f'{flag(name)} needs the package {modules[0]}, which is not installed: '
                            f'{line}')
