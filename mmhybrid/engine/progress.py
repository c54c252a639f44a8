"""Lines that tell how far a run is and how good it has become."""
from __future__ import annotations

import time

import numpy as np
from mmengine.hooks import Hook, LoggerHook

from ..registry import HOOKS

__all__ = ['ProgressHook', 'metrics_table']


@HOOKS.register_module()
class ProgressHook(Hook):
    """A log line with the remaining time at least every ``seconds``, and metrics as a table.

    ``LoggerHook`` counts iterations. On a CPU fifty of them can take minutes, and an evaluation
    of a small set ends before its first line.

    Args:
        seconds: longest time without a line while iterating. Default 20.
    """

    priority = 'LOW'  # after LoggerHook

    def __init__(self, seconds: float = 20.0):
        if not seconds > 0:
            raise ValueError(f'seconds must be positive, got {seconds!r}.')
        self.seconds = seconds
        self._last = 0.0

    def _before_epoch(self, runner, mode='train') -> None:
        self._last = time.monotonic() - 0.75 * self.seconds  # an early first line

    def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode='train') -> None:
        now = time.monotonic()
        if any(isinstance(hook, LoggerHook) and self.every_n_inner_iters(batch_idx, hook.interval)
               for hook in runner._hooks):
            self._last = now
        elif now - self._last >= self.seconds:
            self._last = now
            runner.logger.info(runner.log_processor.get_log_after_iter(runner, batch_idx, mode)[1])

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Log the metrics of a validation."""
        self._log(runner, metrics)

    def after_test_epoch(self, runner, metrics=None) -> None:
        """Log the metrics of a test."""
        self._log(runner, metrics)

    def _log(self, runner, metrics) -> None:
        if metrics:
            runner.logger.info('Metrics\n' + metrics_table(metrics))
        else:
            runner.logger.warning(
                'No metric could be computed. Usually the model predicted nothing above its score '
                'threshold, as one that has hardly trained does.')


def metrics_table(metrics: dict) -> str:
    """Lay out metrics: one row each for boxes and masks in COCO's case, else name and value."""
    rows, rest = {}, {}
    for name, value in metrics.items():
        kind, found, suffix = name.rpartition('/')[2].partition('_mAP')
        if found:
            rows.setdefault({'bbox': 'box', 'segm': 'mask'}.get(kind, kind), {})[
                'AP' + suffix.replace('_', '')] = _number(value)
        elif isinstance(value, (int, float, np.number)):
            rest[name] = _number(value)
    parts = []
    if rows:
        heads = list(dict.fromkeys(head for row in rows.values() for head in row))
        parts.append(_grid(['', *heads],
                           [[kind, *(row.get(head, '') for head in heads)]
                            for kind, row in rows.items()]))
    if rest:
        parts.append(_grid(list(rest), [list(rest.values())]))
    return '\n'.join(parts)


def _number(value) -> str:
    if value == -1:
        return '-'  # pycocotools: no object of this size in the annotations
    if isinstance(value, int):
        return str(value)
    return f'{value:.2f}' if abs(value) >= 1 else f'{value:.3f}'


def _grid(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ['-' * width for width in widths], *rows]
    return '\n'.join('| ' + ' | '.join(
        cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + ' |'
        for line in lines)
