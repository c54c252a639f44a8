"""Losses, gradients and weights that are not finite."""
import logging
from types import SimpleNamespace

import pytest
import torch
import toy
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from mmhybrid.engine import finite_loss
from mmhybrid.engine.config import ensure_finite_loss, ensure_hooks
from mmhybrid.engine.finite_loss import FiniteLossHook
from mmhybrid.errors import UserError
from mmhybrid.weights import read_checkpoint

EPOCHS = dict(by_epoch=True, max_epochs=3)
ITERS = dict(by_epoch=False, max_iters=17)
KEEP = dict(interval=1, max_keep_ckpts=1)
ToyModel = toy.ToyModel


class Log(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float('nan')


class Faulty(nn.Module):
    """Passes its input on, until the calls that ``wrong`` names."""

    def __init__(self, how='output'):
        super().__init__()
        self.calls, self.wrong, self.how = 0, lambda call: False, how

    def forward(self, x):
        self.calls += self.training
        if not self.wrong(self.calls):
            return x
        if self.how == 'gradient':
            return Log.apply(x)
        return x.masked_fill(torch.arange(x.numel()).view(x.shape) == 0, float('nan'))


def train(tmp_path, monkeypatch, wrong, how='output', loop=EPOCHS, checkpoint=KEEP, wrapper=None,
          hooks=(), **settings):
    """Train the toy with a faulty layer before its last one; returns the runner."""
    class Model(ToyModel):
        def __init__(self):
            super().__init__()
            self.net.insert(3, Faulty(how))
            # Repeating a pass must not count as one.
            self.net[3].wrong = lambda call: wrong(self.calls)
            self.calls = 0

        def train_step(self, data, optim_wrapper):
            self.calls += 1
            return super().train_step(data, optim_wrapper)

    monkeypatch.setattr(toy, 'ToyModel', Model)
    monkeypatch.setattr(toy, 'HOOKS', [dict(type='mmhybrid.FiniteLossHook', **settings), *hooks])
    if wrapper:
        monkeypatch.setattr(toy, 'OPTIM_WRAPPER', wrapper)
    sampler = 'DefaultSampler' if loop['by_epoch'] else 'InfiniteSampler'
    return toy.run(tmp_path, loop, checkpoint, val=False, sampler=sampler)


@pytest.mark.parametrize('loop, checkpoint, last', [
    (EPOCHS, KEEP, 'epoch_1.pth'), (ITERS, dict(KEEP, by_epoch=False), 'iter_8.pth')],
    ids=['epoch', 'iterations'])
def test_three_in_a_row_stop_and_name_the_module(tmp_path, monkeypatch, loop, checkpoint, last):
    with pytest.raises(UserError) as caught:
        train(tmp_path, monkeypatch, lambda call: call > 8, loop=loop, checkpoint=checkpoint)
    text = str(caught.value)
    assert 'not finite in 3 iterations in a row (up to 11): loss nan' in text
    assert 'the output of net.3 (Faulty), 1 of 288 values; its input was finite' in text
    for part in ('lower learning rate', 'warm-up', 'clip_grad', 'annotations', 'finite_loss.stop'):
        assert part in text
    assert 'bfloat16' not in text  # nothing is float16 here
    kept, = tmp_path.glob('*.pth')
    if loop is EPOCHS:
        assert kept.name == last and f'The last good checkpoint is {kept}' in text
    state = read_checkpoint(kept)['state_dict']
    assert all(torch.isfinite(value).all() for value in state.values())


def test_weights_stay_good_and_other_batches_go_on(tmp_path, monkeypatch):
    """Two in a row, again and again, with a good one between."""
    runner = train(tmp_path, monkeypatch, lambda call: call % 3 != 0)
    assert runner.iter == 18
    assert all(torch.isfinite(value).all() for value in runner.model.state_dict().values())


def test_finite_training_is_untouched(tmp_path, monkeypatch):
    with_hook = train(tmp_path / 'a', monkeypatch, lambda call: False)
    monkeypatch.setattr(toy, 'HOOKS', [])
    without = toy.run(tmp_path / 'b', EPOCHS, KEEP, val=False)
    assert toy.difference(with_hook, without) == []


def test_looking_leaves_no_trace(tmp_path, monkeypatch):
    """Random numbers, running statistics and gradients are those of a run that never looked."""
    looked = []
    monkeypatch.setattr(FiniteLossHook, '_reason',
                        lambda hook, runner, bad: looked.append(hook._find(runner)))
    with_looks = train(tmp_path / 'a', monkeypatch, lambda call: False)
    monkeypatch.setattr(toy, 'HOOKS', [])
    without = toy.run(tmp_path / 'b', EPOCHS, KEEP, val=False)
    assert looked == [None] * 18
    assert toy.difference(with_looks, without) == []


def test_going_on_when_told_to(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        runner = train(tmp_path, monkeypatch, lambda call: call > 8, stop=False)
    assert runner.iter == 18
    assert all(torch.isfinite(value).all() for value in runner.model.state_dict().values())


def test_patience_is_a_setting(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='in 1 iterations in a row .up to 9'):
        train(tmp_path, monkeypatch, lambda call: call > 8, patience=1)
    with pytest.raises(ValueError, match='patience must be a positive integer, got 0'):
        FiniteLossHook(patience=0)
    with pytest.raises(ValueError, match='max_skipped'):
        FiniteLossHook(max_skipped=2.5)


def test_gradients_that_are_not_finite(tmp_path, monkeypatch):
    """The loss stays finite; 20 steps in a row, counted across epochs."""
    with pytest.raises(UserError) as caught:
        train(tmp_path, monkeypatch, lambda call: call > 4, how='gradient',
              loop=dict(EPOCHS, max_epochs=9))
    text = str(caught.value)
    assert 'gradients were not finite in 20 steps in a row (up to iteration 24)' in text
    # the layer nearest to the loss behind the faulty one
    assert 'the gradient of net.1.bias, 4 of 4 values' in text
    runner = train(tmp_path / 'b', monkeypatch, lambda call: call % 20 != 0, how='gradient',
                   loop=dict(EPOCHS, max_epochs=5))
    assert runner.iter == 30


def test_gradients_of_another_process(tmp_path, monkeypatch):
    """Where each holds a part of the model, all have to count alike to stop together."""
    monkeypatch.setattr(finite_loss, 'any_rank', lambda *flags: (
        [flags[0], True] if len(flags) > 1 else int(flags[0])))
    with pytest.raises(UserError, match='not finite in 20 steps in a row .up to iteration 20'):
        train(tmp_path, monkeypatch, lambda call: False, loop=dict(EPOCHS, max_epochs=4))


def test_running_statistics_that_nothing_mends(tmp_path, monkeypatch):
    class Model(toy.ToyModel):
        def forward(self, inputs, target, mode='tensor'):
            inputs = torch.stack(list(inputs))
            self.seen = getattr(self, 'seen', 0) + 1
            return super().forward(inputs * (float('nan') if self.seen == 8 else 1), target, mode)

    monkeypatch.setattr(toy, 'ToyModel', Model)
    monkeypatch.setattr(toy, 'HOOKS', [dict(type='mmhybrid.FiniteLossHook')])
    with pytest.raises(UserError, match='iteration 8 was not finite and spoilt running statis'):
        toy.run(tmp_path, EPOCHS, KEEP, val=False)


def test_a_batch_that_is_not_finite(tmp_path, monkeypatch):
    class Data(toy.ToyDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return dict(sample, target=sample['target'] * float('inf'))

    monkeypatch.setattr(toy, 'ToyDataset', Data)
    monkeypatch.setattr(toy, 'HOOKS', [dict(type='mmhybrid.FiniteLossHook')])
    with pytest.raises(UserError, match=r'the batch itself \(target\[0\]: 1 of 1 values\)'):
        toy.run(tmp_path, EPOCHS, KEEP, val=False)


def test_images_are_named():
    from mmhybrid.engine.finite_loss import _images
    samples = [SimpleNamespace(img_path='a.jpg'), SimpleNamespace()]
    assert _images(dict(inputs=[], data_samples=samples)) == ' Images of this batch: a.jpg'
    assert _images(dict(inputs=[])) == _images([1]) == _images(None) == ''


@pytest.mark.parametrize('key', ['state_dict', 'ema_state_dict'])
def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch, key):
    """Also those of EMA; and what was infinite at the start is meant (masks)."""
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    class Spoil(Hook):
        priority = 'LOW'

        def before_train(self, runner):
            if key == 'state_dict':
                runner.model.register_buffer('mask', torch.tensor([0.0, -float('inf')]))

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 11:
                ema = [hook.ema_model.module for hook in runner._hooks
                       if hasattr(hook, 'ema_model')]
                for model in ema if key == 'ema_state_dict' else [runner.model]:
                    model.net[0].weight.data[0, 0] = float('nan')

    HOOKS.register_module(name='Spoil', module=Spoil, force=True)
    hooks = [dict(type='Spoil', priority='HIGH')]
    if key == 'ema_state_dict':
        hooks.append(dict(type='EMAHook'))
    monkeypatch.setattr(toy, 'HOOKS', [*hooks, dict(type='mmhybrid.FiniteLossHook')])
    with pytest.raises(UserError) as caught:
        toy.run(tmp_path, EPOCHS, KEEP, val=False)
    text = str(caught.value)
    assert 'not finite after iteration 12' in text and 'net.0.weight (9 of 108 values)' in text
    assert f'last good checkpoint is {tmp_path}/epoch_1.pth' in text
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']


# --- mixed precision: the scaler of PyTorch runs on a CPU too ---

@OPTIM_WRAPPERS.register_module(force=True)
class ScaledOptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does, without an accelerator."""

    def __init__(self, init_scale=2.0 ** 16, fixed=None, **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=fixed or init_scale)
        self._scale_update_param = fixed

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)


def scaled(**settings):
    return dict(type='ScaledOptimWrapper', optimizer=dict(type='AdamW', lr=1e-2), **settings)


def test_float16_that_looks_for_its_scale(tmp_path, monkeypatch):
    """Fifteen skipped steps at the start are usual."""
    runner = train(tmp_path, monkeypatch, lambda call: call <= 15, how='gradient',
                   wrapper=scaled())
    assert runner.iter == 18 and runner.optim_wrapper.loss_scaler.get_scale() == 2.0


def test_float16_whose_scale_falls_below_one(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        train(tmp_path, monkeypatch, lambda call: True, how='gradient', wrapper=scaled())
    text = str(caught.value)
    assert 'loss scale of float16 fell to 0.5 (iteration 17)' in text
    assert 'optim_wrapper.dtype=bfloat16' in text and 'the gradient of net.1.bias' in text


def test_float16_that_skips_twenty_steps(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='in 20 steps in a row .up to iteration 40'):
        train(tmp_path, monkeypatch, lambda call: True, how='gradient',
              loop=dict(EPOCHS, max_epochs=9),
              wrapper=scaled(init_scale=2.0 ** 40, accumulative_counts=2,
                             clip_grad=dict(max_norm=1.0)))


def test_a_fixed_scale_below_one_is_the_users(tmp_path, monkeypatch):
    runner = train(tmp_path, monkeypatch, lambda call: False, wrapper=scaled(fixed=0.5))
    assert runner.iter == 18


def test_accumulated_gradients_are_left_out_together(tmp_path, monkeypatch):
    runner = train(tmp_path, monkeypatch, lambda call: call == 5, wrapper=dict(
        optimizer=dict(type='AdamW', lr=1e-2), accumulative_counts=3))
    assert runner.iter == 18
    assert all(torch.isfinite(value).all() for value in runner.model.state_dict().values())


def test_the_tools_watch_unless_they_are_told_not_to():
    cfg = Config(dict())
    ensure_finite_loss(cfg)
    assert cfg.default_hooks.finite_loss == dict(type='mmhybrid.FiniteLossHook')
    cfg = Config(dict(default_hooks=dict(finite_loss=dict(stop=False))))
    ensure_finite_loss(cfg)
    assert cfg.default_hooks.finite_loss == dict(type='mmhybrid.FiniteLossHook', stop=False)
    cfg = Config(dict(default_hooks=None))
    ensure_finite_loss(cfg)
    assert cfg.default_hooks.finite_loss == dict(type='mmhybrid.FiniteLossHook')
    for off in (None, False):  # mmengine would raise an AssertionError at None
        cfg = Config(dict(default_hooks=dict(finite_loss=off)))
        ensure_finite_loss(cfg)
        assert cfg.default_hooks == {}
    for kind in ('FiniteLossHook', 'mmhybrid.FiniteLossHook', FiniteLossHook):
        cfg = Config(dict(custom_hooks=[dict(type=kind)]))
        ensure_finite_loss(cfg)
        ensure_hooks(cfg, 'mmhybrid.FiniteLossHook')
        assert 'default_hooks' not in cfg and len(cfg.custom_hooks) == 1


@pytest.mark.parametrize('settings, part', [
    (dict(default_hooks=dict(finite_loss=7)), 'default_hooks.finite_loss must be a dict.*got 7'),
    (dict(custom_hooks=dict(type='EMAHook')), r'custom_hooks must be a list.*EMAHook')])
def test_hooks_that_are_none(settings, part):
    with pytest.raises(UserError, match=part):
        ensure_finite_loss(Config(settings))
