"""The end of a training in the log: where everything is, and what comes next."""
from __future__ import annotations

import argparse
import glob
import os.path as osp
import shlex

from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop

from ..checkpointing import recorded
from .hook import RunReportHook

__all__ = ['tell_end']


def tell_end(runner, args: argparse.Namespace) -> None:
    """Log where checkpoints, tables, pictures and logs of a finished training are.

    Args:
        runner: of the training.
        args: the command line, for the next command.
    """
    loop, folder = runner.train_loop, runner.work_dir
    if isinstance(loop, EpochBasedTrainLoop):
        ended = f'epoch {loop.epoch} of {loop.max_epochs}'
    else:
        ended = f'iteration {loop.iter} of {loop.max_iters}'
    early = ', stopped early' if getattr(loop, 'stop_training', False) else ''
    saving = next((hook for hook in runner._hooks if isinstance(hook, CheckpointHook)), None)
    last, best = recorded(folder), getattr(saving, 'best_ckpt_path', None)
    report = next((hook for hook in runner._hooks if isinstance(hook, RunReportHook)), None)
    rows = [('last checkpoint', last), ('best checkpoint', _best(runner, best)),
            *((_NAMES.get(osp.basename(path), 'report'), path)
              for path in (report.written if report else ())),
            ('log', next(iter(glob.glob(osp.join(glob.escape(runner.log_dir), '*.log'))), None)),
            ('config', osp.join(folder, osp.basename(args.config)))]
    lines = [f'Training ended after {ended}{early}. In {folder}:']
    lines += [f'  {name:16} {_within(path, folder)}' for name, path in rows if path]
    lines += ['Next:', *(f'  {line}' for line in _next(runner, args, best or last))]
    runner.logger.info('\n'.join(lines))


_NAMES = {'curves.png': 'curves', 'classes.csv': 'classes', 'confusion.csv': 'confusion matrix',
          'confusion.png': '  as a picture', 'validations.json': 'validations'}


def _best(runner, path: str | None) -> str | None:
    if not path:
        return None
    score = runner.message_hub.runtime_info.get('best_score')
    return f'{path} ({score:.4g})' if isinstance(score, (int, float)) else path


def _within(path: str, folder: str) -> str:
    return path.removeprefix(folder.rstrip('/') + '/')


def _next(runner, args: argparse.Namespace, checkpoint: str | None) -> list[str]:
    lines = []
    if runner.cfg.get('default_scope') in ('mmdet', 'mmseg'):
        lines.append(f'mmhybrid predict PICTURES --weights {shlex.quote(runner.work_dir)}')
    if checkpoint and runner.cfg.get('test_cfg') is not None:
        data = f' --data-root {shlex.quote(args.data_root)}' if args.data_root else ''
        lines.append(f'mmhybrid test {shlex.quote(args.config)} {shlex.quote(checkpoint)}{data}')
    return lines or [f'look at {osp.join(runner.work_dir, "report")}']
