"""Checks of a checkpoint: is it there, and does it fit the model?

mmengine does not find at all that a checkpoint has other classes than the config: it logs the
difference and goes on with random weights.
"""
from __future__ import annotations

import os
import os.path as osp

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop

from mmhybrid.weights import (
    WeightsError,
    check_file,
    fetch,
    is_known_source,
    is_remote,
    kind_of,
    strip_parallel,
    unwrap,
)
from mmhybrid.weights.adapters import fit_adapters

from ..errors import UserError
from ..models.backbones.base import DenseBackbone
from ..models.checkpoints import LoadReport, check_windows, fit_weights
from ..registry import HOOKS
from .small_gpu import check_adapters

__all__ = ['CheckpointCheckHook', 'check_checkpoint_file', 'check_whole']


def check_checkpoint_file(path: str, what: str = 'checkpoint') -> None:
    """Raise UserError unless ``path`` is a complete file of weights; fetch it from elsewhere."""
    path = osp.expanduser(path)
    if is_known_source(path):
        try:
            fetch(path)
        except (WeightsError, OSError) as error:
            raise UserError(f'The {what} {error}.') from error
        return
    if is_remote(path):
        return
    folder = osp.dirname(path) or '.'
    names = os.listdir(folder) if os.access(folder, os.R_OK) and osp.isdir(folder) else []
    files = [osp.join(folder, name) for name in names
             if name.endswith('.pth') and osp.isfile(osp.join(folder, name))
             and name != osp.basename(path)]
    newest = [osp.basename(name) for name in sorted(files, key=osp.getmtime)[-5:]]
    there = f' {folder} also holds {", ".join(newest)}.' if newest else ''
    try:
        check_file(path)
    except FileNotFoundError as error:
        raise UserError(f'The {what} {path} does not exist.{there}') from error
    except WeightsError as error:
        raise UserError(f'The {what} {error}.{there}') from error


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Refuses a checkpoint that does not fit the model.

    When testing or resuming, everything must be there.  Starting a new training from a checkpoint
    (``load_from``) may leave parts out on purpose, for example a head for other classes; there a
    backbone of this package must fit, and a file of the backbone alone goes into the backbone.

    Args:
        strict: False starts a new training from whatever fits.
    """

    priority = 'ABOVE_NORMAL'  # before EMAHook, which takes the weights from state_dict

    def __init__(self, strict: bool = True):
        self.strict = strict

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare names and shapes."""
        if isinstance(runner._train_loop, BaseLoop) and not runner._resume:
            self._start(runner, checkpoint)
        elif not runner._resume and _is_classifier_alone(runner.model, checkpoint):
            self._whole_classifier(runner, checkpoint)
        else:
            self._continue(runner, checkpoint)

    def _whole_classifier(self, runner, checkpoint: dict) -> None:
        report = self._start(runner, checkpoint)
        missing = report.comparison.missing
        if missing:
            raise UserError(f'{runner._load_from} lacks {len(missing)} tensors of '
                            f'{report.module}:\n  ' + '\n  '.join(_first(missing))
                            + '\nA test needs all of them.')

    def _start(self, runner, checkpoint: dict) -> LoadReport | None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = getattr(model, 'backbone', None)
        if not isinstance(backbone, DenseBackbone):
            return None  # mmengine's report in the log is all there is
        weights, report = fit_weights(backbone, checkpoint, str(runner._load_from),
                                      strict=self.strict)
        runner.logger.info(str(report))
        _align(checkpoint, model)
        if kind_of(unwrap(checkpoint)[0]) in ('classification', 'backbone'):
            meta = checkpoint.get('meta')
            checkpoint.clear()
            checkpoint['state_dict'] = {f'backbone.{name}': t for name, t in weights.items()}
            if meta is not None:
                checkpoint['meta'] = meta
        return report

    def _continue(self, runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if runner._resume:
            check_adapters(model, checkpoint.get('state_dict') or {}, str(runner._load_from))
        extra = check_whole(model, checkpoint)
        check_windows(model, str(runner._load_from))
        _align(checkpoint, model)
        if extra:
            runner.logger.warning(f'{len(extra)} tensors of the checkpoint have no place in the '
                                  f'model and are left out: {", ".join(_first(extra))}')


def _is_classifier_alone(model: torch.nn.Module, checkpoint: dict) -> bool:
    """Whether a file has a network with its head, as published, and the model is a shell of one."""
    backbone = getattr(model.module if is_model_wrapper(model) else model, 'backbone', None)
    if not isinstance(backbone, DenseBackbone) or kind_of(
            backbone.state_dict()) != 'classification':
        return False
    names = unwrap(checkpoint)[0]
    return kind_of(names) == 'classification' and not any('backbone.' in name for name in names)


def _align(checkpoint: dict, model: torch.nn.Module) -> None:
    """Give tensors the model's names: mmengine takes away 'module.' alone, and only once."""
    state = checkpoint.get('state_dict')
    if not isinstance(state, dict):
        return
    bare, removed = strip_parallel(state)
    wanted = strip_parallel(model.state_dict())[1]
    if removed != wanted:
        checkpoint['state_dict'] = {wanted + name: tensor for name, tensor in bare.items()}


def check_whole(model: torch.nn.Module, checkpoint: dict) -> list[str]:
    """Raise UserError unless a checkpoint holds all of a model, in its shapes.

    Returns:
        Names of tensors that have no place in the model.
    """
    theirs, own = ({key: value for key, value in strip_parallel(state)[0].items()
                    if isinstance(value, torch.Tensor)}
                   for state in (checkpoint.get('state_dict', checkpoint), model.state_dict()))
    given, wanted = ({key: tuple(value.shape) for key, value in state.items()}
                     for state in (fit_adapters(theirs, own), own))
    shapes = [f'{key}: {given[key]} in the file, {shape} in the model'
              for key, shape in wanted.items() if key in given and given[key] != shape]
    missing = [key for key in wanted
               if key not in given and not key.endswith('num_batches_tracked')]
    problems = []
    if shapes:
        problems += [f'{len(shapes)} tensors have other shapes:', *_first(shapes)]
    if missing:
        problems += [f'{len(missing)} of {len(wanted)} tensors are not in the file:',
                     *_first(missing)]
    if problems:
        classes = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
        known = len(classes.get('classes') or ())
        hint = (f' It was trained with {known} classes; compare num_classes of the heads.'
                if known else '')
        raise UserError('The checkpoint does not fit the model of this config:\n  '
                        + '\n  '.join(problems)
                        + f'\nUse the config it was trained with.{hint}')
    return [key for key in given if key not in wanted]


def _first(items: list[str], count: int = 3) -> list[str]:
    return items[:count] + (['...'] if len(items) > count else [])
