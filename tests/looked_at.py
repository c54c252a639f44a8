"""Checkpoints of trainings that have hardly begun, as work directories that are looked at."""
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from shrink import shrink
from small_runs import quick
from trained import trained

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def write_run(name, folder):
    """Write the checkpoint of a small model of ``configs/<name>.py``; returns the folder."""
    torch.manual_seed(0)
    whole = shrink(Config.fromfile(CONFIGS / f'{name}.py'))
    cfg = Config({key: whole[key] for key in ('default_scope', 'data_root', 'model',
                                              'test_dataloader')})
    dataset = cfg.test_dataloader.dataset
    kind = DATASETS.get(f'{cfg.default_scope}.{dataset.type}')
    folder.mkdir(exist_ok=True)
    with quick():  # formats no config
        trained(cfg, folder / 'epoch_1.pth', (dataset.get('metainfo') or kind.METAINFO)['classes'])
    return str(folder)
