"""A model and a data set small enough to train in milliseconds, with randomness everywhere."""
import copy
import random
import uuid

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

LOADED = []  # indices of all samples loaded in this process
HOOKS = []  # further hooks for every run
OPTIM_WRAPPER = dict(optimizer=dict(type='AdamW', lr=1e-2))


class ToyDataset(Dataset):
    metainfo = dict(classes=('one', 'two'))

    def __init__(self, size=12):
        self.data = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        LOADED.append(index)
        image = self.data[index] * random.uniform(0.5, 1.5) + np.random.uniform(-1, 1)
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return dict(inputs=image, target=self.data[index].mean())


class ToyModel(BaseModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
                                 nn.Flatten(), nn.Linear(4 * 36, 1))

    def forward(self, inputs, target, mode='tensor'):
        out = self.net(torch.stack(list(inputs)))[:, 0]
        target = torch.stack(list(target))
        if mode == 'loss':
            return dict(loss=(out - target).square().mean())
        return list(out + torch.rand(()))  # a prediction that draws random numbers


class ToyMetric(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.extend(sample.item() for sample in data_samples)

    def compute_metrics(self, results):
        return dict(mean=float(np.mean(results)), noise=float(np.random.rand()))


def loader(sampler, size=12, batch_size=2, num_workers=0):
    return dict(batch_size=batch_size, num_workers=num_workers, dataset=ToyDataset(size),
                sampler=sampler, collate_fn=dict(type='pseudo_collate'))


def run(work_dir, train_cfg, checkpoint, resume=None, seed=3, sampler='DefaultSampler', val=True,
        launcher='none', hook=True, num_workers=0, wrapper=None, optim=None,
        load_from=None, kind=None, **cfg):
    """Train the toy; returns the runner.

    ``resume`` and ``load_from``: path of a checkpoint. ``optim``: further settings of the
    optimizer wrapper. ``kind``: the runner's class. ``cfg``: what it reads from its config.
    """
    LOADED.clear()
    val_cfg = dict(
        val_dataloader=loader(dict(type='DefaultSampler', shuffle=False), size=5),
        val_cfg=dict(), val_evaluator=Evaluator(ToyMetric())) if val else {}
    cfg = dict(cfg, **(dict(model_wrapper_cfg=wrapper) if wrapper else {}))
    runner = (kind or Runner)(
        model=ToyModel(), work_dir=str(work_dir),
        train_dataloader=loader(dict(type=sampler, shuffle=True), num_workers=num_workers),
        train_cfg=train_cfg,
        optim_wrapper=dict(copy.deepcopy(OPTIM_WRAPPER), **(optim or {})),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20),
                         dict(type='MultiStepLR', by_epoch=True, milestones=[2], gamma=0.5)],
        default_hooks=dict(checkpoint={'type': 'CheckpointHook', **checkpoint}),
        custom_hooks=[*HOOKS, *([dict(type='mmhybrid.RandomStateHook')] if hook else [])],
        randomness=dict(seed=seed, diff_rank_seed=launcher != 'none'), launcher=launcher,
        load_from=resume or load_from, resume=bool(resume),
        env_cfg=dict(dist_cfg=dict(backend='gloo')), default_scope='mmengine',
        experiment_name=uuid.uuid4().hex, log_level='WARNING', **val_cfg,
        **(dict(cfg=cfg) if cfg else {}))
    runner.train()
    return runner


def difference(left, right):
    """Names of the tensors that differ in models, optimizers and schedules of two runners."""
    model = [name for name, value in left.model.state_dict().items()
             if not torch.equal(value, right.model.state_dict()[name])]
    a, b = left.optim_wrapper.state_dict(), right.optim_wrapper.state_dict()
    optimizer = [f'optimizer {key} {name}' for key, state in a['state'].items()
                 for name, value in state.items()
                 if not torch.equal(value, b['state'][key][name])]
    if a['param_groups'] != b['param_groups']:
        optimizer.append('param_groups')
    return model + optimizer
