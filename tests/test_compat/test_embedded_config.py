"""A checkpoint of training predicts from the file alone."""
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import save_checkpoint
from shrink import shrink
from trained import trained

import mmhybrid.plugin  # noqa: F401  (its import installs what is tested)

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(('name', 'kind'), [
    ('cascade_mambavision_mini_coco', 'det'), ('upernet_mambavision_mini_ade20k', 'seg')])
def test_checkpoints_predict_from_the_file_alone(name, kind, tmp_path, monkeypatch):
    pytest.importorskip('mmdet'), pytest.importorskip('mmseg')
    warned = []
    monkeypatch.setattr('mmhybrid.compat.checkpoint_loader.print_log',
                        lambda text, logger, level: warned.append((level, text)))
    cfg = shrink(Config.fromfile(CONFIGS / f'{name}.py'))
    model = trained(cfg, tmp_path / f'{kind}.pth')
    if kind == 'det':
        from mmdet.apis import DetInferencer as Inferencer
        options = {}
    else:
        from mmseg.apis import MMSegInferencer as Inferencer
        options = dict(model=None)
    inferencer = Inferencer(weights=str(tmp_path / f'{kind}.pth'), device='cpu', **options)
    assert warned == []  # nothing was left out
    assert inferencer.model.cfg.train_cfg == cfg.train_cfg
    for (key, ours), theirs in zip(inferencer.model.state_dict().items(),
                                   model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    found = inferencer(np.zeros((64, 64, 3), np.uint8))['predictions']
    assert len(found[0]['scores']) == len(found[0]['labels']) if kind == 'det' else (
        found.shape == (64, 64))


def test_a_model_that_could_run_code_is_not_built(tmp_path, caplog):
    pytest.importorskip('mmdet')
    from mmdet.apis import DetInferencer
    cfg = "model = dict(type='os.mkdir', path='ran')\n"
    save_checkpoint(dict(meta=dict(cfg=cfg), state_dict={}), str(tmp_path / 'w.pth'))
    with caplog.at_level(logging.WARNING), pytest.raises(AttributeError, match='model'):
        DetInferencer(weights=str(tmp_path / 'w.pth'), device='cpu')
    assert not (tmp_path / 'ran').exists() and not Path('ran').exists()
