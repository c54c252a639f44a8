"""The file of a test's metrics, written by one process.

mmengine has every process of a test write ``<time>/<time>.json``, at once into the same file: what
a longer text leaves behind a shorter one is not JSON.
"""

from __future__ import annotations

import functools

from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook

__all__ = ['install', 'is_installed']


def install() -> None:
    """Have the first process alone log and write what a test gave; all have the same metrics."""
    if not is_installed():
        LoggerHook.after_test_epoch = _in_main_process(LoggerHook.after_test_epoch)


def is_installed() -> bool:
    """Whether it is so."""
    return hasattr(LoggerHook.after_test_epoch, '__wrapped__')


def _in_main_process(after_test_epoch):
    @functools.wraps(after_test_epoch)
    def after(self, runner, metrics=None):
        if is_main_process():
            after_test_epoch(self, runner, metrics)

    return after
