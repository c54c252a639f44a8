"""A resumed run equals the uninterrupted one bit for bit."""
import random

import numpy as np
import pytest
import torch
import toy

from mmhybrid.engine.random_state import get_random_state, set_random_state

EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)
ITERS = dict(by_epoch=False, max_iters=17, val_interval=4)


def draw():
    return random.random(), np.random.normal(), np.random.rand(), torch.rand(2).tolist()


def test_state_survives_a_checkpoint_file(tmp_path):
    np.random.normal()  # leaves a cached second value, which is part of the state
    random.gauss(0, 1)
    torch.save(get_random_state(), tmp_path / 'state.pth')
    expected = draw(), random.gauss(0, 1)
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert (draw(), random.gauss(0, 1)) == expected


CASES = {
    'epoch': (EPOCHS, dict(interval=1), 'epoch_1.pth', 'DefaultSampler'),
    # save_best writes epoch_1.pth once more, after the validation.
    'epoch, best': (EPOCHS, dict(interval=1, save_best='toy/mean', rule='greater'), 'epoch_1.pth',
                    'DefaultSampler'),
    'mid-epoch': (EPOCHS, dict(interval=4, by_epoch=False), 'iter_4.pth', 'DefaultSampler'),
    'end of an epoch, by iteration': (EPOCHS, dict(interval=6, by_epoch=False), 'iter_6.pth',
                                      'DefaultSampler'),
    'iterations, infinite': (ITERS, dict(interval=5, by_epoch=False), 'iter_5.pth',
                             'InfiniteSampler'),
    'iterations, with validation': (ITERS, dict(interval=4, by_epoch=False), 'iter_8.pth',
                                    'InfiniteSampler'),
    'iterations, finite sampler': (ITERS, dict(interval=5, by_epoch=False), 'iter_10.pth',
                                   'DefaultSampler'),
    'iterations, end of the data': (ITERS, dict(interval=6, by_epoch=False), 'iter_12.pth',
                                    'DefaultSampler'),
}


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    # mmengine sleeps two seconds at the end of a finite sampler.
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


@pytest.mark.parametrize('seed', [3, None], ids=['seeded', 'unseeded'])
@pytest.mark.parametrize('name', CASES)
def test_resume_is_bitwise(tmp_path, name, seed):
    train_cfg, checkpoint, file, sampler = CASES[name]
    whole = toy.run(tmp_path / 'a', train_cfg, checkpoint, sampler=sampler, seed=seed)
    seen = len(toy.LOADED)
    path, = (tmp_path / 'a').glob(file)
    resumed = toy.run(tmp_path / 'b', train_cfg, checkpoint, resume=str(path), sampler=sampler,
                      seed=seed)
    assert resumed.iter == whole.iter and resumed.epoch == whole.epoch
    assert toy.difference(whole, resumed) == []
    assert len(toy.LOADED) < seen  # the batches that were skipped were not loaded


def test_without_the_hook_resume_differs(tmp_path):
    """The toy would notice: the property does not come from a lack of randomness."""
    whole = toy.run(tmp_path / 'a', EPOCHS, dict(interval=1), hook=False)
    resumed = toy.run(tmp_path / 'b', EPOCHS, dict(interval=1), hook=False,
                      resume=str(tmp_path / 'a/epoch_1.pth'))
    assert toy.difference(whole, resumed) != []


def test_validation_does_not_disturb_training(tmp_path):
    quiet = toy.run(tmp_path / 'a', EPOCHS, dict(interval=1), val=False)
    validated = toy.run(tmp_path / 'b', EPOCHS, dict(interval=1), val=True)
    assert toy.difference(quiet, validated) == []


@pytest.mark.parametrize('train_cfg, by_epoch', [(EPOCHS, True), (ITERS, False)])
def test_workers_continue_at_the_right_batch(tmp_path, train_cfg, by_epoch):
    """Worker processes draw augmentations of their own, so only the course is compared."""
    checkpoint = dict(interval=1 if by_epoch else 5, by_epoch=by_epoch)
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    toy.run(tmp_path / 'a', train_cfg, checkpoint, sampler=sampler, num_workers=1)
    path = tmp_path / 'a' / ('epoch_1.pth' if by_epoch else 'iter_5.pth')
    resumed = toy.run(tmp_path / 'b', train_cfg, checkpoint, sampler=sampler, num_workers=1,
                      resume=str(path))
    assert resumed.iter == (18 if by_epoch else 17)


def test_other_number_of_processes_is_said(tmp_path, capsys):
    toy.run(tmp_path / 'a', EPOCHS, dict(interval=1))
    path = tmp_path / 'a/epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['random_state']['ranks'] *= 2
    torch.save(checkpoint, path)
    toy.run(tmp_path / 'b', EPOCHS, dict(interval=1), resume=str(path))
    output = capsys.readouterr()
    assert 'the checkpoint holds 2, this run has 1' in output.out + output.err
