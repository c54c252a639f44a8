"""The toy of toy.py behind a config file: tools/train.py and tools/test.py in a second."""
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import toy
from mmengine.config import config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.visualization import Visualizer
from PIL import Image
from torch import nn
from yapf.yapflib import yapf_api

from mmhybrid.cli.actions.running import run_command

CONFIG = """
default_scope = 'mmengine'
model = dict(type='SmallModel')
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='SmallDataset', size=12),
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=1, num_workers=0, dataset=dict(type='SmallDataset', size=5),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='SmallMetric')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=8),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=3, milestones=[1, 2], gamma=0.5)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', interval=1))
randomness = dict(seed=1)
auto_scale_lr = dict(enable=False, base_batch_size=4)
"""


@DATASETS.register_module(force=True)
class SmallDataset(toy.ToyDataset):
    pass


@METRICS.register_module(force=True)
class SmallMetric(toy.ToyMetric):
    pass


@MODELS.register_module(force=True)
class SmallModel(toy.ToyModel):
    """``pooled``: norm of a branch that pools to one value per image, or None."""

    def __init__(self, pooled=None, frozen=False, init_cfg=None):
        super().__init__()
        self.init_cfg = init_cfg
        self.branch, self.frozen = None, frozen
        if pooled is not None:
            norm = dict(BN=nn.BatchNorm2d, SyncBN=nn.SyncBatchNorm,
                        GN=lambda width: nn.GroupNorm(2, width))[pooled]
            self.branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(
                nn.Conv2d(3, 4, 1), norm(4)))

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.branch.eval()
        return self

    def forward(self, inputs, target, mode='tensor'):
        out = super().forward(inputs, target, mode)
        if self.branch is not None and mode == 'loss':
            out['loss_branch'] = self.branch(torch.stack(list(inputs))).square().mean()
        return out


def write(folder, extra='', name='small.py'):
    """Write the config, with lines added; returns its path."""
    path = folder / name
    path.write_text(CONFIG + extra)
    return str(path)


@contextmanager
def quick(pictures=False):
    """Start afresh, as a process that runs one tool, and leave out what takes half of the time.

    mmengine formats the config for every checkpoint and asks compilers for their versions. The
    pictures at the end of a training are dots, unless ``pictures`` are wanted.
    """
    forget_instances()
    before = dict(os.environ)
    try:
        # One mmengine looks the function up when it loads, the other whenever it formats.
        holder = config if hasattr(config, 'FormatCode') else yapf_api
        with mock.patch.object(holder, 'FormatCode', lambda text, **_: (text, True)), \
                mock.patch('mmengine.runner.runner.collect_env', dict), \
                nullcontext() if pictures else mock.patch.multiple(
                    'mmhybrid.engine.run_report.hook', draw_curves=_dot, draw_confusion=_dot):
            yield
    finally:
        torch.set_flush_denormal(False)
        os.environ.clear()
        os.environ.update(before)


def _dot(*_):
    return Image.new('RGB', (1, 1))


def forget_instances():
    """A process that runs one tool has one logger and one visualizer; tests run many in a second.

    Their names hold the time in seconds, so two runs would share them.
    """
    for kind in (MessageHub, MMLogger, Visualizer, *Visualizer.__subclasses__()):
        getattr(kind, '_instance_dict', {}).clear()


def run(capfd, tool, *argv):
    """Run a tool's main function; returns exit code, text after "ERROR: ", and all output."""
    capfd.readouterr()
    with quick():
        code = run_command(tool, [str(arg) for arg in argv])
    said = capfd.readouterr()
    output = said.out + said.err
    assert 'Traceback' not in output, output
    assert output.count('ERROR: ') == (code == 1), output  # others: stopped by a signal
    return SimpleNamespace(code=code, error=output.partition('ERROR: ')[2].strip(), output=output)
