"""The cascade head of ViTDet: one mask head, mean probabilities, divided gradients."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from shrink import on_meta, shrink

import mmhybrid.models.roi_heads  # noqa: F401

CONFIG = Path(__file__).resolve().parents[2] / 'configs/cascade_vim_ti_coco.py'


def head_config(**changes):
    init_default_scope('mmdet')
    model = shrink(Config.fromfile(CONFIG)).model
    given = dict(model.roi_head, train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn)
    return ConfigDict(dict(given, **changes))


@pytest.fixture
def head():
    built = MODELS.build(head_config())
    for stage in built.bbox_head:  # so that classes and stages differ
        torch.nn.init.normal_(stage.fc_cls.weight, std=2.0)
        torch.nn.init.normal_(stage.fc_reg.weight, std=0.1)
    return built


def features(**options):
    return [torch.randn(1, 32, 32 >> i, 32 >> i, **options) for i in range(5)]


ROIS = torch.tensor([[0, 4.0, 4.0, 60.0, 50.0], [0, 30.0, 20.0, 100.0, 90.0]])
METAS = [dict(img_shape=(128, 128), ori_shape=(128, 128), scale_factor=(1.0, 1.0))]


def test_scores_are_mean_probabilities(head):
    x = features()
    with torch.no_grad():
        rois, scores, deltas = head._refine_roi(x, ROIS, METAS, (2,))
        expected, boxes, logits = 0, ROIS, []
        for stage in range(3):
            results = head._bbox_forward(stage, x, boxes)
            logits.append(results['cls_score'])
            expected = expected + results['cls_score'].softmax(-1) / 3
            if stage < 2:
                refined = head.bbox_head[stage].regress_by_class(
                    boxes[:, 1:], logits[-1][:, :-1].argmax(1), results['bbox_pred'], METAS[0])
                boxes = torch.cat([boxes[:, :1], refined], dim=1)
    torch.testing.assert_close(scores[0].softmax(-1), expected)
    torch.testing.assert_close(rois[0], boxes)
    torch.testing.assert_close(deltas[0], results['bbox_pred'])
    # mmdet's mean of logits is another number
    assert (sum(logits).div(3).softmax(-1) - expected).abs().max() > 0.01


def test_gradients_of_a_stage_are_divided(head):
    from mmdet.models.roi_heads import CascadeRoIHead

    x = features(requires_grad=True)
    head._bbox_forward(1, x, ROIS)['cls_score'].square().sum().backward()
    ours = x[0].grad.clone()
    own = head.bbox_head[1].fc_cls.weight.grad.clone()
    x[0].grad = None
    head.zero_grad()
    CascadeRoIHead._bbox_forward(head, 1, x, ROIS)['cls_score'].square().sum().backward()
    assert x[0].grad.abs().max() > 0
    torch.testing.assert_close(ours, x[0].grad / 3)
    torch.testing.assert_close(own, head.bbox_head[1].fc_cls.weight.grad)


def sample():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    found = DetDataSample(metainfo=dict(METAS[0], img_id=0))
    boxes = torch.tensor([[8.0, 8.0, 56.0, 60.0], [40.0, 20.0, 90.0, 88.0]])
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    found.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([3, 17]), masks=BitmapMasks(masks.numpy(), 128, 128))
    found.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0).long())
    return found


def test_losses(head, monkeypatch):
    counts = []
    relabel = head.bbox_loss
    monkeypatch.setattr(head, 'bbox_loss', lambda stage, x, samples: counts.append(
        len(samples[0].priors)) or relabel(stage, x, samples))
    corner = torch.rand(30, 2) * 90
    proposals = InstanceData(bboxes=torch.cat([corner, corner + 8 + 25 * torch.rand(30, 2)], 1))
    losses = head.loss(features(), [proposals], [sample()])
    assert {name for name in losses if 'mask' in name} == {'s0.loss_mask'}
    assert {name for name in losses if 'loss_bbox' in name} == {
        f's{stage}.loss_bbox' for stage in range(3)}
    total = sum(value for name, value in losses.items() if 'loss' in name)
    assert torch.isfinite(total)
    total.backward()
    assert head.mask_head.conv_logits.weight.grad.abs().max() > 0
    # Drawn once: what the first stage saw, without the two ground truth boxes added to it.
    assert counts[0] == 16 and counts[1] == counts[2]
    assert 14 <= counts[1] <= 16


def test_masks_of_the_final_boxes(head):
    head.eval()
    results = InstanceData(bboxes=ROIS[:, 1:], labels=torch.tensor([1, 2]),
                           scores=torch.tensor([0.9, 0.8]))
    with torch.no_grad():
        found, = head.predict_mask(features(), METAS, [results])
        scores, deltas, masks = head(features(), [InstanceData(bboxes=ROIS[:, 1:])], [sample()])
    assert found.masks.shape == (2, 128, 128)
    assert scores[0].shape == (2, 81) and deltas[0].shape == (2, 4)
    assert masks[0].shape == (2, 80, 28, 28) and 0 <= masks[0].min() and masks[0].max() <= 1


def test_several_mask_heads_are_refused():
    single = head_config().mask_head
    with pytest.raises(TypeError, match='got 3 configs for mask_head, expected a single one'):
        MODELS.build(head_config(mask_head=[single] * 3))


def test_it_saves_the_parameters_of_two_mask_heads():
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIG)
    with on_meta():
        ours = MODELS.build(cfg.model.roi_head)
        theirs = MODELS.build(dict(cfg.model.roi_head, type='CascadeRoIHead'))
    count = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert count[1] - count[0] == 5_288_608
