"""Writes tables and pictures of a training into its work directory."""
from __future__ import annotations

import csv
import io
import json
import math
import os.path as osp
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop
from PIL import Image

from mmhybrid.visualization.training import draw_confusion, draw_curves

from ...compat.whole_checkpoints import write_aside
from ...errors import UserError
from ...registry import HOOKS
from .scores import ClassScores, watcher_of

__all__ = ['FOLDER', 'RunReportHook', 'scores_table']

FOLDER = 'report'  # in the work directory
VALIDATIONS = 'validations.json'
ROWS = 30  # of the table in the log
CURVES = ('mAP', 'mIoU', 'mIoU_present', 'mAcc', 'top1', 'mDice', 'mFscore')
RATES = ('train/base_lr', 'train/lr')  # layers may have a rate of their own each


@HOOKS.register_module()
class RunReportHook(Hook):
    """Keeps the results of validations, and writes them when the training ends.

    In ``report/`` of the work directory: ``curves.png`` (loss, learning rate, metrics),
    ``classes.csv`` (AP, IoU or accuracy of each class), ``confusion.csv`` and ``confusion.png``,
    these three of the last validation, and ``validations.json``. A resumed run goes on with the
    validations that came before.
    """

    priority = 'LOW'

    def __init__(self):
        self.written: list[str] = []
        self._watchers: list | None = None
        self._validations: list[dict] = []
        self._scores: ClassScores | None = None
        self._training = False

    def before_train(self, runner) -> None:
        """Find what was before the break of a resumed run."""
        self._training = True
        if runner._resume:
            self._validations = [each for each in _read(osp.join(runner.work_dir, FOLDER))
                                 if each['iter'] <= runner.iter]

    def before_val_epoch(self, runner) -> None:
        """Take down what the evaluator will compute."""
        if self._watchers is None:
            found = map(watcher_of, runner.val_loop.evaluator.metrics)
            self._watchers = [each for each in found if each is not None]
        for watcher in self._watchers:
            watcher.begin()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Count what is counted image by image."""
        loader = runner.val_loop.dataloader
        first = batch_idx * (getattr(loader, 'batch_size', None) or 1)
        for watcher in self._watchers or ():
            watcher.add(outputs, first, len(loader.dataset))

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Keep what came out."""
        found = [each for each in (watcher.end() for watcher in self._watchers or ())
                 if each is not None]
        self._scores = found[0] if found else None
        if not self._training:
            return
        _check_best(runner, metrics or {})
        numbers = {name: float(value) for name, value in (metrics or {}).items()
                   if isinstance(value, (int, float, np.number)) and not isinstance(value, bool)}
        if not is_main_process():
            return
        self._validations.append(dict(epoch=runner.epoch, iter=runner.iter, metrics=numbers))
        self._write(runner, VALIDATIONS, json.dumps(self._validations, indent=1).encode())

    def after_train(self, runner) -> None:
        """Write tables and pictures."""
        if not is_main_process():
            return
        title = osp.basename(osp.normpath(runner.work_dir))
        self._write(runner, 'curves.png', _png(_curves(runner, self._validations, title)))
        scores = self._scores
        if scores is None:
            return
        runner.logger.info('Classes in the last validation\n' + scores_table(scores))
        self._write(runner, 'classes.csv', _csv(
            ['class', *scores.heads], ([name, *(f'{value:.6g}' for value in row)]
                                       for name, row in zip(scores.classes, scores.table,
                                                            strict=True))))
        self._write(runner, 'confusion.csv', _csv(
            ['truth \\ predicted', *scores.columns],
            ([name, *map(str, row)] for name, row in zip(scores.rows, scores.counts.tolist(),
                                                         strict=True))))
        self._write(runner, 'confusion.png', _png(draw_confusion(
            scores.counts, scores.rows, scores.columns, f'{title}: {scores.rule}')))

    def _write(self, runner, name: str, content: bytes) -> None:
        path = osp.join(runner.work_dir, FOLDER, name)
        try:
            write_aside(path, content)
        except OSError as error:  # no reason to lose a training
            runner.logger.warning(f'{path} could not be written: {error.strerror}.')
            return
        if path not in self.written:
            self.written.append(path)


def _check_best(runner, metrics: dict) -> None:
    """mmengine looks up the metric that the best checkpoint goes by without asking."""
    saving = next((hook for hook in runner._hooks if isinstance(hook, CheckpointHook)), None)
    wanted = getattr(saving, 'key_indicators', None) or []
    missing = [name for name in wanted if name != 'auto' and name not in metrics]
    if metrics and missing and saving.save_best:
        raise UserError(
            f'--save-best {missing[0]} (default_hooks.checkpoint.save_best) is not a metric of the '
            f'validation, which gives {", ".join(metrics)}. Set it to one of these and go on with '
            '--resume.')


def _read(folder: str) -> list[dict]:
    """Validations of a run before a break, without what is damaged."""
    found = []
    with suppress(OSError, ValueError):
        with open(osp.join(folder, VALIDATIONS), encoding='utf-8') as file:
            found = json.load(file)
    return [each for each in found if isinstance(each, dict) and isinstance(each.get('iter'), int)
            and isinstance(each.get('metrics'), dict)] if isinstance(found, list) else []


# --- curves ---------------------------------------------------------------------------------------

def _curves(runner, validations: list[dict], title: str) -> Image.Image:
    loop, scalars = runner.train_loop, runner.message_hub.log_scalars
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    loss = _history(scalars, 'train/loss')
    rate = next((found for found in (_history(scalars, name) for name in RATES) if len(found)),
                np.zeros(0))
    return draw_curves(loss, rate, max(1, runner.iter), dict(_metrics(validations)),
                       len(loop.dataloader) if by_epoch else None, title)


def _history(scalars: dict, name: str) -> np.ndarray:
    return np.asarray(scalars[name].data[0], float) if name in scalars else np.zeros(0)


def _metrics(validations: list[dict]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """The metrics that are looked at most, or all there are."""
    names = list(dict.fromkeys(name for each in validations for name in each['metrics']))
    chosen = [name for name in names if name.endswith(CURVES)] or names
    for name in chosen:
        points = [(each['iter'], each['metrics'][name]) for each in validations
                  if isinstance(each['metrics'].get(name), (int, float))]
        yield name, [(step, value if math.isfinite(value) else math.nan)
                     for step, value in points]


# --- tables ---------------------------------------------------------------------------------------

def scores_table(scores: ClassScores) -> str:
    """Scores of the classes that were there; of many, the best and the worst."""
    key = scores.heads.index('IoU') if 'IoU' in scores.heads else len(scores.heads) - 1
    order = np.argsort(-np.nan_to_num(scores.table[:, key], nan=-1), kind='stable')
    scored = [index for index in order if np.isfinite(scores.table[index, key])] or order
    cells = [[scores.classes[index], *map(_cell, scores.heads, scores.table[index])]
             for index in scored]
    blank = ['' for _ in scores.heads]
    if len(cells) > ROWS:
        half = ROWS // 2
        cells = [*cells[:half], [f'... {len(cells) - 2 * half} more', *blank], *cells[-half:]]
    if len(scored) < len(order):
        cells.append([f'{len(order) - len(scored)} not in the images', *blank])
    heads = ['class', *scores.heads]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [heads, ['-' * width for width in widths], *cells]
    return '\n'.join(
        '| ' + ' | '.join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
            line[1:], widths[1:], strict=True))]) + ' |' for line in lines)


def _cell(head: str, value: float) -> str:
    if math.isnan(value):
        return '-'
    return str(int(value)) if head in ('objects', 'pixels', 'images') else f'{value:.3f}'


def _csv(heads: Sequence[str], rows) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue().encode()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG')
    return buffer.getvalue()
