import numpy as np
import pytest
import torch

pytest.importorskip('mmseg')

from mmhybrid.evaluation.present_iou import (  # noqa: E402
    PresentIoUMetric,
    majority_iou,
    present_iou,
)


def _sample(prediction, truth):
    return dict(pred_sem_seg=dict(data=torch.tensor([prediction])),
                gt_sem_seg=dict(data=torch.tensor([truth])))


def test_absent_classes_do_not_count():
    # Class 0: 3 of 4 pixels found. Class 1: 2 of 2, and one pixel of class 0. Class 2 is predicted
    # nowhere, class 3 once where class 255 (ignored) is, class 4 once wrongly.
    metric = PresentIoUMetric()
    metric.dataset_meta = dict(classes=list('abcde'))
    metric.process({}, [_sample([[0, 0, 0, 1], [1, 1, 3, 4]], [[0, 0, 0, 0], [1, 1, 255, 1]])])
    metrics = metric.evaluate(size=1)
    a, b = 3 / 4, 2 / 4
    assert metrics['mIoU_present'] == pytest.approx(100 * (a + b) / 2, abs=0.01)
    # mmseg's own mean takes class 4 as a third one with 0.
    assert metrics['mIoU'] == pytest.approx(100 * (a + b) / 3, abs=0.01)
    assert metrics['classes_present'] == 2
    # 'a' everywhere: 4 of the 7 counted pixels for one class, 0 for the other.
    assert metrics['mIoU_majority'] == pytest.approx(100 * 4 / 7 / 2, abs=0.01)


def test_functions():
    truth = np.array([6., 0., 2.])
    assert majority_iou(truth) == pytest.approx(6 / 8 / 2)
    assert present_iou(truth, truth, truth) == 1
    assert np.isnan(present_iou(truth * 0, truth * 0, truth * 0))
    assert np.isnan(majority_iou(truth * 0))


def test_config_spelling():
    from mmengine.registry import METRICS, DefaultScope
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert isinstance(METRICS.build(dict(type='mmhybrid.PresentIoUMetric')), PresentIoUMetric)


def test_older_checkpoints_find_it():
    """Their configs import the module where it was."""
    from mmhybrid.engine import present_iou as former
    assert former.PresentIoUMetric is PresentIoUMetric
