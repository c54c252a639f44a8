"""SIGTERM, SIGUSR1 and Ctrl-C at every moment of a training."""
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmhybrid.cli.actions.running import run_command
from mmhybrid.engine import stop_signals as module
from mmhybrid.engine.amp import has_accelerator
from mmhybrid.engine.checkpointing import newest_whole
from mmhybrid.engine.stop_signals import Stopped, stop_signals
from mmhybrid.weights import read_checkpoint

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
ROOT = Path(__file__).resolve().parents[2]
EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)
ITERS = dict(by_epoch=False, max_iters=17, val_interval=4)
EVERY = dict(interval=1, max_keep_ckpts=1)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


@HOOKS.register_module(force=True)
class SendSignal(Hook):
    """Sends a signal to this process at one moment."""

    def __init__(self, moment, at, number=signal.SIGTERM, times=1):
        def send(runner, *_, **__):
            if not self.sent and (at is None or runner.iter == at):
                self.sent = True
                for _ in range(times):
                    os.kill(os.getpid(), number)
        self.sent = False
        setattr(self, moment, send)


def hooks(monkeypatch, *more):
    monkeypatch.setattr(toy, 'HOOKS', [
        dict(type='mmhybrid.StopSignalHook'), dict(type='mmhybrid.ResumeSettingsHook'),
        dict(type='mmhybrid.FiniteLossHook'), *more])


def stopped(folder, monkeypatch, train, checkpoint=EVERY, sampler='DefaultSampler', more=(),
            **signal_at):
    """Train until the signal; returns the exit code."""
    hooks(monkeypatch, dict(type='SendSignal', **signal_at), *more)
    with pytest.raises(Stopped) as caught, stop_signals():
        toy.run(folder, train, checkpoint, sampler=sampler)
    return caught.value.code


CASES = {
    'in an epoch': (EPOCHS, EVERY, 'DefaultSampler', dict(moment='before_train_iter', at=8), 9),
    'last of an epoch': (EPOCHS, EVERY, 'DefaultSampler', dict(moment='before_train_iter', at=5),
                         6),
    'first': (EPOCHS, EVERY, 'DefaultSampler', dict(moment='before_train_epoch', at=0), 1),
    'in a validation': (EPOCHS, EVERY, 'DefaultSampler', dict(moment='before_val_iter', at=12), 12),
    'without a checkpoint before': (EPOCHS, dict(interval=3), 'DefaultSampler',
                                    dict(moment='before_val_iter', at=6), 6),
    'while computing metrics': (EPOCHS, dict(interval=3), 'DefaultSampler',
                                dict(moment='after_val_epoch', at=6), 6),
    'while writing': (EPOCHS, EVERY, 'DefaultSampler', dict(moment='before_save_checkpoint', at=6),
                      6),
    'iterations': (ITERS, dict(EVERY, by_epoch=False, interval=5), 'InfiniteSampler',
                   dict(moment='before_train_iter', at=6), 7),
    'iterations, validation': (ITERS, dict(EVERY, by_epoch=False, interval=5), 'InfiniteSampler',
                               dict(moment='before_val_iter', at=8), 8),
    'just before a validation': (ITERS, dict(EVERY, by_epoch=False, interval=4), 'InfiniteSampler',
                                 dict(moment='before_train_iter', at=7), 8),
    'in the last validation': (EPOCHS, EVERY, 'DefaultSampler',
                               dict(moment='before_val_iter', at=18), 18),
    'iterations, last validation': (ITERS, dict(EVERY, by_epoch=False, interval=5),
                                    'InfiniteSampler', dict(moment='before_val_iter', at=17), 17),
    'last iteration': (ITERS, dict(EVERY, by_epoch=False, interval=5), 'InfiniteSampler',
                       dict(moment='before_train_iter', at=16), 17),
}


@pytest.mark.parametrize('name', CASES)
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, name):
    train, checkpoint, sampler, at, iterations = CASES[name]
    checkpoint = dict(checkpoint, save_best='toy/mean', rule='greater')
    hooks(monkeypatch)
    whole = toy.run(tmp_path / 'a', train, checkpoint, sampler=sampler)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert stopped(tmp_path / 'b', monkeypatch, train, checkpoint, sampler, **at) == 143
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    path, notes = newest_whole(str(tmp_path / 'b'))
    assert path == str(tmp_path / 'b/interrupted.pth') and notes == []
    assert read_checkpoint(path)['meta']['iter'] == iterations
    hooks(monkeypatch)
    resumed = toy.run(tmp_path / 'b', train, checkpoint, sampler=sampler, resume=path)
    assert toy.difference(whole, resumed) == []
    # As many validations: one that was cut short is repeated, one that was done is not.
    left, right = (len(run.message_hub.get_scalar('val/toy/mean').data[0])
                   for run in (whole, resumed))
    assert left == right


@pytest.mark.parametrize('train, checkpoint, sampler, at', [
    (EPOCHS, EVERY, 'DefaultSampler', 7),
    (ITERS, dict(EVERY, by_epoch=False, interval=5), 'InfiniteSampler', 6)],
    ids=['epochs', 'iterations'])
def test_gradients_that_wait_for_their_step(tmp_path, monkeypatch, train, checkpoint, sampler, at):
    given = dict(sampler=sampler, optim=dict(accumulative_counts=5))
    hooks(monkeypatch)
    whole = toy.run(tmp_path / 'a', train, checkpoint, **given)
    hooks(monkeypatch, dict(type='SendSignal', moment='before_train_iter', at=at))
    with pytest.raises(Stopped), stop_signals():
        toy.run(tmp_path / 'b', train, checkpoint, **given)
    path = str(tmp_path / 'b/interrupted.pth')
    assert read_checkpoint(path)['pending_gradients']['ranks']
    hooks(monkeypatch)
    resumed = toy.run(tmp_path / 'b', train, checkpoint, resume=path, **given)
    assert toy.difference(whole, resumed) == []


def test_the_same_validation_is_cut_short_twice(tmp_path, monkeypatch):
    checkpoint, path = dict(EVERY, by_epoch=False, interval=5), str(tmp_path / 'b/interrupted.pth')
    hooks(monkeypatch)
    whole = toy.run(tmp_path / 'a', ITERS, checkpoint, sampler='InfiniteSampler')
    for resume in (None, path):
        hooks(monkeypatch, dict(type='SendSignal', moment='before_val_iter', at=8))
        with pytest.raises(Stopped), stop_signals():
            toy.run(tmp_path / 'b', ITERS, checkpoint, sampler='InfiniteSampler', resume=resume)
    hooks(monkeypatch)
    resumed = toy.run(tmp_path / 'b', ITERS, checkpoint, sampler='InfiniteSampler', resume=path)
    assert toy.difference(whole, resumed) == []
    # What is written after it is what --resume continues now.
    assert newest_whole(str(tmp_path / 'b'))[0] == str(tmp_path / 'b/iter_17.pth')
    (tmp_path / 'b/last_checkpoint').unlink()
    assert newest_whole(str(tmp_path / 'b'))[0] == str(tmp_path / 'b/iter_17.pth')


def test_no_second_checkpoint_where_one_was_written(tmp_path, monkeypatch):
    code = stopped(tmp_path, monkeypatch, ITERS, dict(EVERY, by_epoch=False, interval=5),
                   'InfiniteSampler', moment='before_train_iter', at=4, number=signal.SIGUSR1)
    assert code == 138
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_5.pth']


def test_a_run_without_checkpoints_saves_one_all_the_same(tmp_path, monkeypatch):
    class Runner(toy.Runner):
        def __init__(self, default_hooks, **given):
            super().__init__(default_hooks=dict(checkpoint=None), **given)

    monkeypatch.setattr(toy, 'Runner', Runner)
    stopped(tmp_path, monkeypatch, EPOCHS, moment='before_val_iter', at=6)
    assert newest_whole(str(tmp_path)) == (str(tmp_path / 'interrupted.pth'), [])


def test_averaged_weights(tmp_path, monkeypatch):
    """In a validation the model holds EMA's weights; the checkpoint must hold both in place."""
    ema = dict(type='EMAHook')
    hooks(monkeypatch, ema)
    whole = toy.run(tmp_path / 'a', EPOCHS, EVERY)
    stopped(tmp_path / 'b', monkeypatch, EPOCHS, more=[ema], moment='before_val_iter', at=6)
    hooks(monkeypatch, ema)
    resumed = toy.run(tmp_path / 'b', EPOCHS, EVERY, resume=str(tmp_path / 'b/interrupted.pth'))
    assert toy.difference(whole, resumed) == []
    left, right = (torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False)['state_dict']
                   for name in 'ab')
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_the_old_checkpoint_is_not_rotated_away(tmp_path, monkeypatch):
    stopped(tmp_path, monkeypatch, EPOCHS, moment='before_train_iter', at=8)
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [
        'epoch_1.pth', 'interrupted.pth']


def test_the_line_says_how_to_continue(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(toy, 'Runner', toy.Runner)
    stopped(tmp_path, monkeypatch, EPOCHS, moment='before_train_iter', at=8)
    output = capfd.readouterr()
    assert 'SIGTERM: finishing this iteration, then saving a checkpoint.' in output.err
    assert (f'Stopped by SIGTERM after iteration 9. The same command with --resume continues from '
            f'{tmp_path}/interrupted.pth') in output.out + output.err
    assert 'Traceback' not in output.out + output.err


def test_repeated_sigterm_and_the_echo_of_ctrl_c_are_one_request(tmp_path, monkeypatch):
    for name, number, code in (('a', signal.SIGTERM, 143), ('b', signal.SIGINT, 130)):
        assert stopped(tmp_path / name, monkeypatch, EPOCHS, moment='before_train_iter', at=8,
                       number=number, times=3) == code
        assert (tmp_path / name / 'interrupted.pth').exists()


def test_ctrl_c_twice_stops_at_once(tmp_path, monkeypatch):
    times = iter(range(0, 1000, 5))
    monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=lambda: next(times)))
    hooks(monkeypatch, dict(type='SendSignal', moment='before_train_iter', at=8,
                            number=signal.SIGINT, times=2))
    with pytest.raises(KeyboardInterrupt), stop_signals():
        toy.run(tmp_path, EPOCHS, EVERY)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_before_the_training_there_is_nothing_to_save(tmp_path, capfd):
    def main(argv):
        with stop_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    assert run_command(main, []) == 143
    output = capfd.readouterr()
    assert 'Stopped by SIGTERM before the training began' in output.err
    assert 'Traceback' not in output.err and 'ERROR' not in output.err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_the_middle_of_a_print(tmp_path, monkeypatch, capfd):
    """Python refuses a second write while a first one waits; the request must not be lost."""
    class Busy:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, text):
            if 'SIGTERM: finishing' in text:
                raise RuntimeError('reentrant call inside <_io.BufferedWriter>')
            return self.stream.write(text)

    monkeypatch.setattr(sys, 'stderr', Busy(sys.stderr))
    assert stopped(tmp_path, monkeypatch, EPOCHS, moment='before_train_iter', at=8) == 143
    assert 'SIGTERM: finishing this iteration' in capfd.readouterr().err


def test_a_signal_after_the_training(tmp_path, monkeypatch, capfd):
    hooks(monkeypatch)
    with pytest.raises(Stopped), stop_signals():
        toy.run(tmp_path, dict(EPOCHS, max_epochs=1), EVERY)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
    assert 'Stopped by SIGTERM after the training ended' in capfd.readouterr().err


def test_after_the_training_handlers_are_as_before(tmp_path, monkeypatch):
    hooks(monkeypatch)
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) is module._request
        toy.run(tmp_path, dict(EPOCHS, max_epochs=1), EVERY)
        assert not module._request.training
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and module._request is None


def test_handlers_of_others_stay(monkeypatch):
    """nohup ignores a signal; a program may have a handler of its own."""
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR1) is module._request
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def work():
        with stop_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def raise_signals():
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    os._exit(7)


def test_workers_do_not_answer(capfd):
    """A Ctrl-C in a terminal reaches them too; they end with their parent."""
    with stop_signals():
        worker = multiprocessing.get_context('fork').Process(target=raise_signals, daemon=True)
        worker.start()
        worker.join(20)
        assert module._request.signal is None
    assert worker.exitcode == 7
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('moment, at', [('after_train_iter', 7), ('before_val_epoch', 6)])
def test_workers_that_the_signal_ended(tmp_path, monkeypatch, moment, at):
    """No further batch comes: what is there is saved, and the error is not shown."""
    class Loader:
        def __init__(self, loader):
            self.loader = loader

        def __getattr__(self, name):
            return getattr(self.loader, name)

        def __iter__(self):
            for batch in self.loader:
                yield batch
                if module._asked():
                    raise RuntimeError('DataLoader worker (pid(s) 12, 13) exited unexpectedly')

        def __len__(self):
            return len(self.loader)

    hooks(monkeypatch)
    whole = toy.run(tmp_path / 'a', EPOCHS, EVERY)
    monkeypatch.setattr(module.StopSignalHook, 'after_train_iter', lambda *_, **__: None)
    monkeypatch.setattr(module.StopSignalHook, 'after_val_iter', lambda *_, **__: None)
    hooks(monkeypatch, dict(type='SendSignal', moment=moment, at=at))

    class Runner(toy.Runner):
        def train(self):
            pass

    monkeypatch.setattr(toy, 'Runner', Runner)
    runner = toy.run(tmp_path / 'b', EPOCHS, EVERY)
    monkeypatch.undo()
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    runner.train_loop.dataloader = Loader(runner.train_loop.dataloader)
    runner.val_loop.dataloader = Loader(runner.val_loop.dataloader)
    monkeypatch.setattr(module.StopSignalHook, 'after_train_iter', lambda *_, **__: None)
    monkeypatch.setattr(module.StopSignalHook, 'after_val_iter', lambda *_, **__: None)
    runner.train = lambda: toy.Runner.train(runner)
    with pytest.raises(Stopped), stop_signals():
        module.train(runner)
    monkeypatch.undo()
    hooks(monkeypatch)
    resumed = toy.run(tmp_path / 'b', EPOCHS, EVERY, resume=str(tmp_path / 'b/interrupted.pth'))
    assert toy.difference(whole, resumed) == []


def test_other_errors_are_not_hidden(tmp_path):
    def train():
        raise RuntimeError('CUDA error')

    runner = SimpleNamespace(train=train, _hooks=[module.StopSignalHook()])
    with pytest.raises(RuntimeError, match='CUDA error'), stop_signals():
        module._request.training = True
        os.kill(os.getpid(), signal.SIGTERM)
        module.train(runner)


WORKER = """
import os, signal, sys, time, torch, toy
import torch.distributed as dist
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmhybrid.engine.distributed import leave_process_group, prepare_launch
from mmhybrid.errors import UserError
from mmhybrid.engine.stop_signals import Stopped, stop_signals
folder = sys.argv[1]
rank = int(os.environ['RANK'])
cfg = Config(dict()); prepare_launch(cfg, 'pytorch')
common = dict(launcher='pytorch', wrapper=cfg.model_wrapper_cfg)
EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)
@HOOKS.register_module()
class Send(Hook):
    def __init__(self, moment, at):
        self.sent = False
        def send(runner, *a, **k):
            if rank == 1 and runner.iter == at and not self.sent:
                self.sent = True; os.kill(os.getpid(), signal.SIGUSR1)
        setattr(self, moment, send)
drop = lambda names: [name for name in names if 'running' not in name]
stop = dict(type='mmhybrid.StopSignalHook'); finite = dict(type='mmhybrid.FiniteLossHook')
toy.HOOKS = [stop, finite]
class Slow(toy.Runner):
    def save_checkpoint(self, *a, **k):
        if rank == 0: time.sleep(0.5)
        super().save_checkpoint(*a, **k)
whole = toy.run(folder + '/a', EPOCHS, dict(interval=1), **common)
for name, moment, at, n in (('b', 'before_train_iter', 4, 5), ('c', 'before_val_iter', 6, 6)):
    toy.HOOKS = [stop, finite, dict(type='Send', moment=moment, at=at)]
    quick, toy.Runner = toy.Runner, Slow
    try:
        with stop_signals():
            toy.run(folder + '/' + name, EPOCHS, dict(interval=1), **common)
        raise SystemExit('was not stopped')
    except Stopped as error:
        assert error.code == 138, error.code
    toy.Runner = quick
    path = open(f'{folder}/{name}/last_checkpoint').read()
    assert torch.load(path, weights_only=False)['meta']['iter'] == n, path
    toy.HOOKS = [stop, finite]
    resumed = toy.run(folder + '/' + name, EPOCHS, dict(interval=1), resume=path, **common)
    assert drop(toy.difference(whole, resumed)) == [], name
class Model(toy.ToyModel):
    def forward(self, inputs, target, mode='tensor'):
        out = super().forward(inputs, target, mode)
        if rank == 1 and mode == 'loss':
            out['loss'] = out['loss'] * float('nan')
        return out
toy.ToyModel = Model; toy.HOOKS = [stop, finite]
try:
    toy.run(folder + '/d', EPOCHS, dict(interval=1), val=False, **common)
    raise SystemExit('was not stopped')
except UserError as error:
    text = str(error)
    parts = (['process 0'] if rank else
             ['In process 1: The loss was not finite in 3', 'loss, which the model computes'])
    assert all(part in text for part in parts), text
print('agreed')
del whole, resumed  # what they hold keeps gloo's threads, and one may abort a process that ends
leave_process_group()
assert not dist.is_initialized()
"""


@pytest.mark.skipif(has_accelerator(), reason='runs on a CPU')
def test_two_processes_agree(tmp_path):
    """A signal, and a loss that is not finite, in the second of two."""
    (tmp_path / 'worker.py').write_text(WORKER)
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(tmp_path / 'worker.py'), str(tmp_path)], capture_output=True, text=True, timeout=200,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(
            [str(ROOT), str(ROOT / 'tests')])))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('agreed') == 2
