"""Stop a training in good order: finish the iteration, save, and say how to continue.

SIGTERM is what a cluster sends before it kills, SIGUSR1 what Slurm sends before a time limit
(``#SBATCH --signal=USR1@120``), SIGINT is Ctrl-C.
"""
from __future__ import annotations

import bisect
import os
import os.path as osp
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from mmengine.dist import all_gather_object, all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop

from ..compat.whole_checkpoints import write_aside
from ..registry import HOOKS
from .checkpointing import INTERRUPTED, RECORD
from .random_state import RandomStateHook

__all__ = ['VALIDATING', 'StopSignalHook', 'Stopped', 'any_rank', 'stop_signals', 'train']

NAMES = ('SIGTERM', 'SIGUSR1', 'SIGINT')
VALIDATING = 'stopped_in_validation'  # in a checkpoint's message hub: it is still to be done
# torchrun passes on the Ctrl-C that its processes have got from the terminal already.
ECHO = 1.0  # seconds


class Stopped(SystemExit):
    """The end of a training that a signal stopped; its code is 128 + the signal's number."""


class _Request:
    """What the signals of this process have asked for."""

    def __init__(self):
        self.pid = os.getpid()
        self.signal: signal.Signals | None = None
        self.since = 0.0
        self.training = self.trained = False
        self.of_children = None  # the handler of SIGCHLD that was there before the request

    def __call__(self, number: int, frame) -> None:
        """Handle a signal."""
        if os.getpid() != self.pid:
            return  # a data loading worker; this process ends it when it is time
        name = signal.Signals(number).name
        if not self.training:
            when = 'after the training ended' if self.trained else 'before the training began'
            _say(f'Stopped by {name} {when}; nothing was lost.')
            raise Stopped(128 + number)
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()
            # Workers that got the same signal end, and PyTorch would raise that as an error here.
            if hasattr(signal, 'SIGCHLD'):
                self.of_children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            again = ' Once more stops at once.' if number == signal.SIGINT else ''
            _say(f'{name}: finishing this iteration, then saving a checkpoint.{again}')
        elif number == signal.SIGINT and time.monotonic() - self.since > ECHO:
            raise KeyboardInterrupt


def _say(text: str) -> None:
    """print() may fail where the signal came in the middle of another one."""
    with suppress(OSError):
        os.write(2, f'\n{text}\n'.encode())


_request: _Request | None = None


@contextmanager
def stop_signals() -> Iterator[None]:
    """Within, the three signals are a request that :class:`StopSignalHook` answers.

    A signal that is ignored (``nohup``) or that the program handles itself stays as it is. Outside
    the main thread nothing changes, because Python handles signals there.
    """
    global _request
    if threading.current_thread() is not threading.main_thread() or _request is not None:
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    _request = request = _Request()
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, request)
    try:
        yield
    finally:
        _request = None
        for number, handler in before.items():
            if signal.getsignal(number) is request:
                signal.signal(number, handler)
        if request.of_children is not None:
            signal.signal(signal.SIGCHLD, request.of_children)


def train(runner) -> None:
    """``runner.train()`` within :func:`stop_signals`, also if the signal ends workers first."""
    try:
        runner.train()
    except (RuntimeError, OSError, EOFError) as error:
        hook = next((hook for hook in runner._hooks if isinstance(hook, StopSignalHook)), None)
        of_a_worker = 'DataLoader worker' in str(error) or not isinstance(error, RuntimeError)
        if not (of_a_worker and _asked() and hook) or get_world_size() > 1:
            raise
        hook.stop_between_iterations(runner)


def any_rank(*flags: bool | int) -> int | list[int]:
    """The largest of all processes for each of ``flags``; each process has to ask.

    mmengine reads every loss back in every iteration, so this waits for nothing new.
    """
    values = torch.tensor([int(flag) for flag in flags])
    if get_world_size() > 1:
        all_reduce(values, 'max')
    return values.tolist() if len(flags) > 1 else int(values)


@HOOKS.register_module()
class StopSignalHook(Hook):
    """Ends a training that was asked to stop by a signal, see :func:`stop_signals`.

    It saves ``interrupted.pth`` in the folder of the checkpoints, unless ``CheckpointHook`` saved
    in this iteration, and raises :class:`Stopped`. A resumed run equals one without a break; a
    validation that was cut short begins again. With several processes a validation is finished,
    because nobody else would know, but rank 0 saves when its signal comes.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def __init__(self):
        self._saved: tuple | None = None  # (epoch, iteration) of the newest checkpoint
        self._cut_at: tuple | None = None  # those of the validation that was cut short

    def before_train(self, runner) -> None:
        """From now on there is something to save; repeat a validation that was cut short."""
        if _request is not None:
            _request.training = True
        self._saved = (runner.epoch, runner.iter)
        if runner.message_hub.runtime_info.get(VALIDATING):
            runner.message_hub.update_info(VALIDATING, False)
            if runner.val_loop is not None:
                runner.logger.info('The validation that a signal cut short comes first.')
                runner.val_loop.run()
                self._save(runner, runner.iter)  # that it is done, and which is the best one

    def after_train(self, runner) -> None:
        """What comes now is short and saves nothing."""
        if _request is not None:
            _request.training, _request.trained = False, True

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Note where the run was when this checkpoint was written (rank 0)."""
        meta = checkpoint['meta']
        if 'optimizer' in checkpoint:
            self._saved = (meta['epoch'], meta['iter'])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save and stop, in the same iteration on all ranks."""
        number = any_rank(_asked())
        if not number:
            return
        for hook in _random_states(runner):
            hook.gather(runner)
        path = self._save(runner, runner.iter + 1, _validation_follows(runner))
        self._stop(runner, number, runner.iter + 1, path)

    def before_val(self, runner) -> None:
        """Let rank 0 know the other ranks' random states, to save without them."""
        if _request is not None and _request.training:
            for hook in _random_states(runner):
                hook.gather(runner)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save, and with one process stop."""
        if not _asked() or self._cut_at == (runner.epoch, runner.iter) or not is_main_process():
            return
        if _saves_together(runner):
            return  # when this validation is over, for the others do not know
        self._cut_at = runner.epoch, runner.iter
        _exchange_averages(runner)
        path = self._save(runner, runner.iter, validating=True)
        if get_world_size() == 1:
            self._stop(runner, _asked(), runner.iter, path)
        _exchange_averages(runner)
        self._saved = None  # the end of this validation is not in it

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Save and stop when all ranks are through."""
        if _request is None or not _request.training:
            return  # only evaluating
        number = any_rank(_asked())
        if number:
            self._stop(runner, number, runner.iter, self._save(runner, runner.iter))

    def stop_between_iterations(self, runner) -> None:
        """Save and stop where the next batch does not come any more."""
        validating = runner.message_hub.runtime_info.get('loop_stage') == 'val'
        if validating:
            _exchange_averages(runner)
        self._stop(runner, _asked(), runner.iter, self._save(runner, runner.iter, validating))

    def _save(self, runner, iteration: int, validating: bool = False) -> str:
        """Save unless it is done; returns the path."""
        hook = next((hook for hook in runner._hooks if isinstance(hook, CheckpointHook)), None)
        newest = getattr(hook, 'last_ckpt', None)
        done = self._saved == (runner.epoch, iteration) and newest and not validating
        if _saves_together(runner):
            done = all_gather_object(done)[0]
        if done:
            return newest
        folder = getattr(hook, 'out_dir', None) or runner.work_dir
        runner.message_hub.update_info(VALIDATING, validating)
        runner.save_checkpoint(
            folder, INTERRUPTED, meta=dict(epoch=runner.epoch, iter=iteration), by_epoch=False,
            backend_args=getattr(hook, 'backend_args', None),
            file_client_args=getattr(hook, 'file_client_args', None))
        path = osp.join(folder, INTERRUPTED)
        if is_main_process():
            write_aside(osp.join(runner.work_dir, RECORD), path.encode())
        return path

    def _stop(self, runner, number: int, iteration: int, path: str) -> None:
        barrier()  # torchrun and srun kill a process that still saves when another one has ended
        runner.logger.warning(
            f'Stopped by {signal.Signals(number).name} after iteration {iteration}. The same '
            f'command with --resume continues from {path}')
        raise Stopped(128 + number)


def _validation_follows(runner) -> bool:
    """Whether an iteration loop would validate after this iteration.

    Resumed behind it, it would not. An epoch loop comes to the end of its epoch again.
    """
    loop, done = runner.train_loop, runner.iter + 1
    if not isinstance(loop, IterBasedTrainLoop) or runner.val_loop is None or done < loop.val_begin:
        return False
    interval = loop.dynamic_intervals[bisect.bisect(loop.dynamic_milestones, done + 1) - 1]
    return done % interval == 0 or done == loop.max_iters


def _exchange_averages(runner) -> None:
    """Exchange trained and averaged weights: a validation has the averaged ones in the model."""
    for hook in runner._hooks:
        if isinstance(hook, EMAHook):
            hook._swap_ema_parameters()


def _saves_together(runner) -> bool:
    """Whether all processes have to save in the same moment, because each has a part."""
    return getattr(runner, 'saves_together', False) and get_world_size() > 1


def _asked() -> int:
    """Number of the signal that this process was asked to stop with, or 0."""
    return int(_request.signal or 0) if _request is not None else 0


def _random_states(runner) -> list[RandomStateHook]:
    return [hook for hook in runner._hooks if isinstance(hook, RandomStateHook)]
