"""Small data sets and short runs that all tests of the tools share."""
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco

ROOT = Path(__file__).resolve().parents[2]
# Narrow heads and few classes' worth of scores above 0, so that an untrained model predicts.
SHORT = ['train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
         'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0',
         'val_dataloader.persistent_workers=False', 'test_dataloader.num_workers=0',
         'test_dataloader.persistent_workers=False', 'model.backbone.drop_path_rate=0.2',
         'randomness.seed=1']
DET = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'model.test_cfg.rcnn.score_thr=0.0',
       'model.test_cfg.rcnn.max_per_img=5', *SHORT]
SEG = ['train_cfg.max_iters=4', 'train_cfg.val_interval=4', 'default_hooks.checkpoint.interval=2',
       *SHORT]


@pytest.fixture(scope='session')
def task(tmp_path_factory):
    """``task('det')`` or ``task('seg')``: config, options, folder of a small set. Do not write
    into the folder; ``task(kind, copy=folder)`` copies it first."""
    folder = tmp_path_factory.mktemp('data')
    write_mini_coco(folder / 'det', train=6, val=3)
    write_mini_ade20k(folder / 'seg', train=6, val=3)

    def make(kind, copy=None):
        name = {'det': 'cascade_mambavision_mini_coco', 'seg': 'upernet_mambavision_mini_ade20k'}
        data = folder / kind
        if copy is not None:
            data = Path(shutil.copytree(data, copy))
        return SimpleNamespace(
            config=str(ROOT / 'configs' / f'{name[kind]}.py'), data=str(data),
            options=['--cfg-options', *(DET if kind == 'det' else SEG)],
            first='epoch_1.pth' if kind == 'det' else 'iter_2.pth',
            last='epoch_2.pth' if kind == 'det' else 'iter_4.pth')
    return make


@pytest.fixture(autouse=True)
def _process_state(tmp_path, monkeypatch):
    """Run in an empty folder, and leave no setting of the tools behind."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    # A process that runs one tool has one visualizer and one logger; the folder of the one and the
    # output stream of the other would stick.
    for kind in (MMLogger, Visualizer, *Visualizer.__subclasses__()):
        getattr(kind, '_instance_dict', {}).clear()
    yield
    torch.set_flush_denormal(False)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
