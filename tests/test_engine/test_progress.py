"""Progress lines and the table of metrics."""
import numpy as np
import pytest
import toy

from mmhybrid.engine.progress import ProgressHook, metrics_table


def test_coco_table():
    table = metrics_table({'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.75, 'coco/bbox_mAP_l': -1.0,
                           'coco/segm_mAP': 0.25, 'coco/segm_mAP_50': 0.5})
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()]
    assert rows[0] == ['', 'AP', 'AP50', 'APl']
    assert rows[2:] == [['box', '0.500', '0.750', '-'], ['mask', '0.250', '0.500', '']]


def test_iou_table():
    table = metrics_table(dict(aAcc=np.float64(81.41), mIoU=46.0, mAcc=np.float32(57.01), n=10))
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()]
    assert rows[0] == ['aAcc', 'mIoU', 'mAcc', 'n']
    assert rows[2] == ['81.41', '46.00', '57.01', '10']


def test_time_to_go_is_told_in_training_and_evaluation(tmp_path, monkeypatch):
    """With 6 iterations per epoch LoggerHook's interval of 10 alone would stay silent."""
    lines = []
    monkeypatch.setattr('toy.HOOKS', [ProgressHook(seconds=1e-6)])
    monkeypatch.setattr('mmengine.logging.MMLogger.info', lambda self, text, *a: lines.append(text))
    toy.run(tmp_path, dict(by_epoch=True, max_epochs=1, val_interval=1), dict(interval=1))
    assert any('Epoch(train)' in line and '[1][3/6]' in line and 'eta' in line for line in lines)
    assert any('Epoch(val)' in line and '[2/3]' in line and 'eta' in line for line in lines)
    assert any(line.startswith('Metrics\n') and 'toy/mean' in line for line in lines)


def test_mistake():
    with pytest.raises(ValueError, match='seconds must be positive'):
        ProgressHook(seconds=0)
