"""What the options do to a config."""
from __future__ import annotations

import argparse
import inspect
import os.path as osp

from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from mmhybrid.cli._train_options import AUTO, flag, given
from mmhybrid.engine.config import custom_hooks, has_weights, kind_of_hook
from mmhybrid.engine.loop_check import class_of
from mmhybrid.errors import UserError

from .batch import apply_batch
from .image_size import apply_image_size
from .length import apply_epochs
from .norms import apply_norms

__all__ = ['apply_options', 'best_metric']

# Over the last tenth of what was trained so far, and at most the last 5000 iterations.
AVERAGE = dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=2e-4, gamma=10,
               update_buffers=True)
LOGGERS = dict(tensorboard='TensorboardVisBackend', wandb='WandbVisBackend')


def apply_options(cfg, args: argparse.Namespace, processes: int) -> list[str]:
    """Change a config as the options of :func:`add_arguments` say.

    Args:
        cfg: the config, changed in place; it has been checked, and data are there.
        args: the parsed command line.
        processes: that train together.

    Returns:
        Notes for the log, one or more for each option.

    Raises:
        UserError: an option does not fit the config.
    """
    options, notes = given(args), []
    if 'image_size' in options:
        notes += apply_image_size(cfg, options['image_size'])
    if 'freeze' in options:
        notes.append(_freeze(cfg, options['freeze']))
    if 'ema' in options:
        notes.append(_average(cfg))
    notes += apply_batch(cfg, options, args.cfg_options or {}, processes)
    if 'norms' in options:
        notes += apply_norms(cfg, options['norms'], processes)
    if 'epochs' in options:
        notes += apply_epochs(cfg, options['epochs'], processes)
    if {'early_stop', 'save_best'} & options.keys():
        notes += _keep_best(cfg, options)
    notes += [_log_to(cfg, name) for name in LOGGERS if name in options]
    return notes


def _freeze(cfg, count: int) -> str:
    backbone = cfg.model.get('backbone') or ConfigDict()
    kind = class_of(backbone, MODELS, cfg.get('default_scope'))
    if kind is None or 'frozen_stages' not in inspect.signature(kind.__init__).parameters:
        raise UserError(f'--freeze {count} sets model.backbone.frozen_stages, which '
                        f'{backbone.get("type", "a model without a backbone")} does not have. '
                        'Leave the option out, or freeze parts with --cfg-options '
                        'optim_wrapper.paramwise_cfg.custom_keys.')
    backbone.frozen_stages = count
    return (f'--freeze {count}: the stem and the first {count} stages (blocks) of the backbone '
            'stay as they are' + ('; they are random: give weights with --pretrained.' if not
                                  has_weights(cfg) else '.'))


def _average(cfg) -> str:
    hooks = custom_hooks(cfg)
    there = next((name for name in map(kind_of_hook, hooks) if 'EMA' in name), None)
    if there:
        return f'--ema: the config averages weights already ({there}), with its own settings.'
    cfg.custom_hooks = [*hooks, dict(AVERAGE)]
    return ('--ema: weights are averaged over about the last tenth of the training; validations '
            'and checkpoints have the average.')


# --- the best checkpoint --------------------------------------------------------------------------

def best_metric(cfg) -> str | None:
    """Name of the metric that tells how good a model of this config is; None if nothing does."""
    evaluators = cfg.get('val_evaluator')
    for each in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        kind = str(each.get('type')).rpartition('.')[2] if isinstance(each, dict) else ''
        if kind == 'CocoMetric':
            metric = each.get('metric') or 'bbox'
            wanted = [metric] if isinstance(metric, str) else metric
            kind = 'segm' if 'segm' in wanted else 'bbox'
            return f'{each.get("prefix") or "coco"}/{kind}_mAP'
        if kind == 'PresentIoUMetric':
            return 'mIoU_present'
        if kind == 'IoUMetric':
            return next(iter(each.get('iou_metrics') or ['mIoU']))
        if kind == 'TopAccuracy':
            return f'accuracy/top{next(iter(each.get("topk") or [1]))}'
    return None


def _keep_best(cfg, options: dict) -> list[str]:
    asked = ' '.join(flag(name) for name in ('early_stop', 'save_best') if name in options)
    if cfg.get('val_cfg') is None:
        raise UserError(f'{asked}: the config has no validation (val_cfg is None), so nothing '
                        'tells which checkpoint is better. Leave the option out.')
    cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
    saving = cfg.default_hooks.get('checkpoint') or ConfigDict(type='CheckpointHook')
    cfg.default_hooks.checkpoint = saving
    own = saving.get('save_best')
    wanted = options.get('save_best', AUTO)
    metric = wanted if wanted != AUTO else (
        own if isinstance(own, str) and own != AUTO else best_metric(cfg))
    if metric is None:
        raise UserError(f'{asked}: which metric of val_evaluator tells the best model is not '
                        'known. Name it: --save-best METRIC, such as --save-best coco/bbox_mAP.')
    if metric != own:
        less = any(word in metric.lower() for word in ('loss', 'error'))
        saving.update(save_best=metric, rule='less' if less else 'greater')
    rule = saving.get('rule') or 'greater'
    notes = [f'The checkpoint with the best {metric} is kept as best_*.pth.']
    if 'early_stop' in options:
        if any(kind_of_hook(hook).startswith('EarlyStop') for hook in custom_hooks(cfg)):
            raise UserError(f'--early-stop {options["early_stop"]}: custom_hooks of the config '
                            'have an early stop already. Leave the option out, or the hook.')
        cfg.custom_hooks = [*custom_hooks(cfg), dict(
            type='mmhybrid.EarlyStopHook', monitor=metric, rule=rule,
            patience=options['early_stop'])]
        notes.append(f'--early-stop {options["early_stop"]}: training ends after as many '
                     f'validations in a row without a better {metric}.')
    return notes


# --- loggers --------------------------------------------------------------------------------------

def _log_to(cfg, name: str) -> str:
    kind = LOGGERS[name]
    visualizer = cfg.get('visualizer') or dict(type='Visualizer', name='visualizer')
    backends = list(visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    if any(str(each.get('type')).endswith(kind) for each in backends):
        return f'--{name}: the config logs there already.'
    settings = dict(type=kind)
    where = f'tensorboard --logdir {cfg.work_dir}'
    if name == 'wandb':
        settings['init_kwargs'] = dict(project='mmhybrid', name=osp.basename(cfg.work_dir))
        where = 'project mmhybrid; WANDB_MODE=offline keeps it here'
    cfg.visualizer = dict(visualizer, vis_backends=[*backends, settings])
    return f'--{name}: {where}'
