"""mmdet's faster COCO metric gives the numbers of the ordinary one."""
import json

import coco_cases
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

faster = pytest.importorskip('mmdet.evaluation.metrics.faster_coco_metric')
pytest.importorskip('faster_coco_eval')


def predictions(image):
    """Boxes and masks of both classes, some right."""
    boxes = torch.tensor([[10., 10., 60, 50], [12, 11, 58, 52], [10, 10, 12, 40], [70, 70, 90, 90]])
    masks = np.zeros((4, 100, 120), bool)
    for mask, (x, y, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y:bottom, x:right] = True
    return dict(img_id=image, ori_shape=(100, 120), pred_instances=InstanceData(
        bboxes=boxes, scores=torch.tensor([0.9, 0.4, 0.8, 0.3]) - image / 100,
        labels=torch.tensor([0, 0, 1, 1]), masks=torch.from_numpy(masks)))


def test_equal_numbers(tmp_path):
    from mmdet.evaluation.metrics import CocoMetric
    init_default_scope('mmdet')
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(coco_cases.good()))
    found = []
    for kind in (CocoMetric, faster.FasterCocoMetric):
        metric = kind(ann_file=str(file), metric=['bbox', 'segm'], classwise=True)
        metric.dataset_meta = dict(classes=coco_cases.CLASSES)
        metric.process({}, [predictions(1), predictions(2)])
        found.append(metric.evaluate(2))
    ordinary, quick = found
    assert ordinary['coco/bbox_mAP'] > 0.1 and ordinary['coco/segm_mAP'] > 0.1
    assert {key: quick[key] for key in ordinary} == pytest.approx(ordinary, nan_ok=True, abs=1e-3)
