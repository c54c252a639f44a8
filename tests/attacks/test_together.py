"""Parts of tools/train.py that know nothing of each other, together."""
import json
import os
import signal
import sys
from contextlib import nullcontext

import pytest
import small_runs
import torch
from mmengine.hooks import Hook
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS

from mmhybrid import mmcv_ops, processes
from mmhybrid.cli.actions.training import train
from mmhybrid.datasets.loading import checks
from mmhybrid.engine.explanations import explain
from mmhybrid.engine.work_dir_lock import LOCK
from mmhybrid.errors import UserError
from mmhybrid.weights import read_checkpoint


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


@pytest.fixture
def attempt(tmp_path, capfd):
    """Train the small model with lines added to its config."""
    def run(extra, *argv):
        return small_runs.run(capfd, train, small_runs.write(tmp_path, extra), '--work-dir',
                              tmp_path / 'w', *argv)
    return run


@OPTIM_WRAPPERS.register_module(force=True)
class WrapperOfItsOwn(BaseOptimWrapper):
    """As DeepSpeed's: no counts, and steps that nobody else can watch."""

    def update_params(self, loss):
        loss.backward()
        self.step()
        self.zero_grad()

    backward = None

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()

    def optim_context(self, model):
        return nullcontext()


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'WrapperOfItsOwn'])
def test_a_runner_that_builds_in_an_order_of_its_own(tmp_path, attempt, wrapper):
    result = attempt("runner_type = 'FlexibleRunner'\nenv_cfg = dict(cudnn_benchmark=False)\n"
                     f"custom_hooks = None\noptim_wrapper['type'] = '{wrapper}'\n")
    assert result.code == 0, result.output
    assert (tmp_path / 'w/epoch_3.pth').exists() and not (tmp_path / 'w' / LOCK).exists()


@pytest.mark.parametrize('options', [
    ['default_hooks.finite_loss=None'], ['default_hooks.finite_loss=False']])
def test_the_watch_over_the_loss_is_switched_off(attempt, options):
    result = attempt('', '--cfg-options', *options, 'train_cfg.max_epochs=1')
    assert result.code == 0 and 'FiniteLossHook' not in result.output


@HOOKS.register_module(force=True)
class SendSignalAt(Hook):
    def __init__(self, moment, at):
        def send(runner, *_, **__):
            if runner.iter == at:
                os.kill(os.getpid(), signal.SIGTERM)
        setattr(self, moment, send)


@pytest.mark.parametrize('moment, at, last', [
    ('before_train_iter', 8, 'epoch_3.pth'), ('before_val_iter', 18, 'interrupted.pth')])
def test_stopped_resumed_and_resumed_again(tmp_path, attempt, moment, at, last):
    """By the tools, with gradients that wait for their step; last_checkpoint moves on."""
    waiting = ("optim_wrapper['accumulative_counts'] = 4\n"
               "default_hooks['checkpoint'].update(save_best='toy/mean', rule='greater')\n")
    assert attempt(waiting, '--work-dir', tmp_path / 'whole').code == 0
    stop = f"custom_hooks = [dict(type='SendSignalAt', moment='{moment}', at={at})]\n"
    work = '--work-dir', tmp_path / 'b'
    first = attempt(waiting + stop, *work)
    assert first.code == 143 and 'continues from' in first.output
    assert not (tmp_path / 'b' / LOCK).exists()
    assert 'interrupted.pth' in (tmp_path / 'b/last_checkpoint').read_text()
    assert attempt(waiting, '--resume', *work).code == 0
    assert (tmp_path / 'b/last_checkpoint').read_text() == str(tmp_path / 'b' / last)
    whole, resumed = (read_checkpoint(tmp_path / name)
                      for name in ('whole/epoch_3.pth', f'b/{last}'))
    assert all(torch.equal(value, resumed['state_dict'][key])
               for key, value in whole['state_dict'].items())
    assert (whole['message_hub']['runtime_info']['best_score']
            == resumed['message_hub']['runtime_info']['best_score'])
    again = attempt(waiting, '--resume', *work)
    assert again.code == 0 and 'Nothing is left to train' in again.output


def test_a_signal_between_building_and_training(tmp_path, attempt):
    result = attempt("custom_hooks = [dict(type='SendSignalAt', moment='before_train', at=0)]\n")
    assert result.code == 143 and 'before the training began; nothing was lost' in result.output
    assert not list((tmp_path / 'w').glob('*.pth')) and not (tmp_path / 'w' / LOCK).exists()


@pytest.mark.parametrize('size, rank, first', [
    (None, '0', True), ('1', '0', True), ('2', '0', True), ('2', '1', False), ('two', '0', True)])
def test_who_checks_the_data(monkeypatch, size, rank, first):
    """A size that is not a number is refused later, in a sentence."""
    monkeypatch.setenv('LOCAL_RANK', rank)
    if size is None:
        monkeypatch.delenv('WORLD_SIZE', raising=False)
    else:
        monkeypatch.setenv('WORLD_SIZE', size)
    assert checks._is_first_of_node() is first


@MODELS.register_module(force=True)
class NeedsCompiledMmcv(small_runs.SmallModel):
    def forward(self, inputs, target, mode='tensor'):
        return mmcv_ops._missing_op('deform_conv_forward')(inputs)


def test_an_operator_that_only_compiled_mmcv_has(tmp_path, attempt):
    """In a training, and as a worker or a wrapper hands it on."""
    result = attempt("model['type'] = 'NeedsCompiledMmcv'\n")
    assert result.code == 1 and "mmcv's operator 'deform_conv_forward' was called" in result.error
    assert len(result.error.splitlines()) == 1
    assert not (tmp_path / 'w' / LOCK).exists()  # given back after an error, too
    with pytest.raises(NotImplementedError) as caught:
        mmcv_ops._missing_op('deform_conv_forward')(torch.zeros(1))
    assert explain(caught.value) == str(caught.value)


def test_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setitem(sys.modules, 'torchvision.ops', None)
    with pytest.raises(ImportError) as caught:
        mmcv_ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, 0)
    assert explain(caught.value) == str(caught.value)
    assert "'nms' runs on torchvision, and torchvision cannot be imported" in str(caught.value)


def test_tasks_of_srun_without_a_launcher_work_alone(tmp_path, monkeypatch):
    """The second one shares no training with the first, and so no folder."""
    monkeypatch.setenv('SLURM_PROCID', '1')
    (tmp_path / 'w').mkdir()
    own = os.getpid()
    (tmp_path / 'w' / LOCK).write_text(json.dumps(dict(
        host=processes.host(), namespace=processes.namespace(), pid=own,
        start=processes.started(own), job=None, token='t', since='today')))
    with small_runs.quick(), pytest.raises(UserError, match='Another training works in'):
        train([small_runs.write(tmp_path), '--work-dir', str(tmp_path / 'w')])
