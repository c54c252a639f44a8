"""Resuming: exact with accumulated gradients, and plain about what changed."""
import logging

import pytest
import torch
import toy

from mmhybrid.engine import pending_gradients
from mmhybrid.weights import read_checkpoint

EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)  # 6 iterations each
ITERS = dict(by_epoch=False, max_iters=17, val_interval=4)
ODD = dict(interval=5, by_epoch=False)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    # mmengine sleeps two seconds at the end of a finite sampler.
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


# (loop, checkpoints, sampler, file, iterations per step, waiting gradients in the file)
ACCUMULATED = {
    'between two steps': (ITERS, ODD, 'InfiniteSampler', 'iter_5.pth', 4, True),
    'just before a step': (ITERS, ODD, 'InfiniteSampler', 'iter_15.pth', 4, True),
    'just after a step': (ITERS, ODD, 'InfiniteSampler', 'iter_10.pth', 5, False),
    # 17 is not divisible by 4: the last step is made of one iteration.
    'before the shorter last step': (ITERS, dict(interval=16, by_epoch=False), 'InfiniteSampler',
                                     'iter_16.pth', 4, False),
    'finite sampler': (ITERS, ODD, 'DefaultSampler', 'iter_10.pth', 3, True),
    'end of an epoch': (EPOCHS, dict(interval=1), 'DefaultSampler', 'epoch_1.pth', 4, True),
    'best of an epoch': (EPOCHS, dict(interval=1, save_best='toy/mean', rule='greater'),
                         'DefaultSampler', 'epoch_2.pth', 5, True),
    'inside an epoch': (EPOCHS, ODD, 'DefaultSampler', 'iter_5.pth', 3, True),
    'more than a run': (ITERS, ODD, 'InfiniteSampler', 'iter_5.pth', 100, True),
}


@pytest.mark.parametrize('name', ACCUMULATED)
def test_accumulated_gradients_resume_bitwise(tmp_path, name):
    train_cfg, checkpoint, sampler, file, counts, waiting = ACCUMULATED[name]
    kind = 'mmhybrid.AmpOptimWrapper' if 'epoch' in name else 'OptimWrapper'
    common = dict(sampler=sampler, optim=dict(type=kind, accumulative_counts=counts))
    whole = toy.run(tmp_path / 'a', train_cfg, checkpoint, **common)
    path = str(tmp_path / 'a' / file)
    # Read by the reader that nothing gets past, so a file of this kind stays loadable.
    saved = read_checkpoint(path)[pending_gradients.KEY]
    assert bool(saved['ranks']) == waiting
    resumed = toy.run(tmp_path / 'b', train_cfg, checkpoint, resume=path, **common)
    assert toy.difference(whole, resumed) == []
    assert resumed.optim_wrapper.inner_count == whole.optim_wrapper.inner_count


def test_no_accumulation_saves_nothing(tmp_path):
    toy.run(tmp_path, ITERS, ODD, sampler='InfiniteSampler')
    assert pending_gradients.KEY not in read_checkpoint(str(tmp_path / 'iter_5.pth'))


@pytest.fixture
def log(monkeypatch):
    """Texts of print_log in the module under test, by level."""
    lines = []
    monkeypatch.setattr(pending_gradients, 'print_log',
                        lambda text, logger, level=logging.INFO: lines.append((level, text)))
    return lines


@pytest.mark.parametrize('change, part', [
    (lambda saved: None, 'written without them'),
    (lambda saved: dict(saved, ranks=saved['ranks'] * 2), 'those of 2 process(es)'),
    (lambda saved: dict(saved, accumulative_counts={'': 3}), 'is 4 and was 3')])
def test_what_cannot_be_restored_is_said(tmp_path, log, change, part):
    """Files of earlier versions and other runs resume, and the toy notices the loss."""
    common = dict(sampler='InfiniteSampler', optim=dict(accumulative_counts=4))
    whole = toy.run(tmp_path / 'a', ITERS, ODD, **common)
    path = tmp_path / 'a/iter_5.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint[pending_gradients.KEY] = change(checkpoint[pending_gradients.KEY])
    torch.save(checkpoint, path)
    resumed = toy.run(tmp_path / 'b', ITERS, ODD, resume=str(path), **common)
    assert toy.difference(whole, resumed) != []
    (level, text), = log
    assert level == logging.WARNING and part in text and 'not restored' in text


def test_gradients_at_a_step_need_no_word(tmp_path, log):
    common = dict(sampler='InfiniteSampler', optim=dict(accumulative_counts=5))
    toy.run(tmp_path / 'a', ITERS, ODD, **common)
    toy.run(tmp_path / 'b', ITERS, ODD, resume=str(tmp_path / 'a/iter_10.pth'), **common)
    assert log == []


def test_starting_from_such_a_checkpoint_ignores_them(tmp_path):
    """load_from: nothing of the earlier run's steps comes along."""
    common = dict(sampler='InfiniteSampler', optim=dict(accumulative_counts=4))
    toy.run(tmp_path / 'a', ITERS, ODD, **common)
    path, plain = tmp_path / 'a/iter_5.pth', tmp_path / 'plain.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[pending_gradients.KEY]
    torch.save(checkpoint, plain)
    runs = [toy.run(tmp_path / 'b', ITERS, ODD, load_from=str(file), **common)
            for file in (path, plain)]
    assert runs[0].iter == 17 and toy.difference(*runs) == []
