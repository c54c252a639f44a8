"""Make any config of ours small enough for a CPU test, without changing what it is made of.

Every test that trains or tests a real config goes through :func:`shrink`, so that "small" means one
thing. Kept: the model's parts and their order, the backbone variant, the datasets, the pipelines,
the schedule and the optimizer. Reduced: image size, windows, RoI and proposal counts, head widths
and convolutions, batch and worker counts, and the depth of very large backbones.
"""

from copy import deepcopy

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmhybrid.models.backbones.mambavision import ARCHITECTURES

LONG_SIDE = 128  # of a detector's image
SHORT_SIDE = 96
CROP = 64  # side of a segmentor's training image
WIDTH = 32  # channels of necks and heads
MANY_PARAMETERS = 200_000_000


def shrink(cfg, *, batch_size=2):
    """Return a small copy of ``cfg``.

    Args:
        cfg (Config): a whole config, a detector's or a segmentor's.
        batch_size (int): images per training step on one device.

    Returns:
        Config: independent of ``cfg``.
    """
    cfg = Config(deepcopy(cfg.to_dict()))
    model = cfg.model
    detector = 'roi_head' in model
    _shrink_backbone(model.backbone, side=LONG_SIDE if detector else CROP)
    if detector:
        _shrink_detector(model)
    else:
        model.data_preprocessor.size = (CROP, CROP)
        for name in ('decode_head', 'auxiliary_head'):
            model[name].channels = WIDTH
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg[name]
        loader.update(num_workers=0, persistent_workers=False)
        _shrink_pipeline(loader.dataset.pipeline, detector)
    cfg.train_dataloader.batch_size = batch_size
    _shrink_pipeline(cfg.get('tta_pipeline', []), detector)
    return cfg


def _shrink_backbone(backbone, side):
    # Windows of exactly the size of the stage's map: one window per image and no padding.
    backbone.window_size = (8, 8, side // 16, side // 32)
    with torch.device('meta'):
        built = MODELS.build(backbone)
    if sum(p.numel() for p in built.parameters()) <= MANY_PARAMETERS:
        return
    # Widths stay, so the neck and the heads still fit; two blocks are one of each kind.
    backbone.arch = dict(ARCHITECTURES[backbone.arch], depths=(1, 1, 2, 2))


def _shrink_detector(model):
    model.neck.out_channels = WIDTH
    model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)

    roi_head = model.roi_head
    roi_head.bbox_roi_extractor.out_channels = WIDTH
    roi_head.mask_roi_extractor.out_channels = WIDTH
    for head in _as_list(roi_head.bbox_head):
        head.update(in_channels=WIDTH, fc_out_channels=2 * WIDTH)
        if 'conv_out_channels' in head:
            head.update(conv_out_channels=WIDTH, num_shared_convs=1)
    for head in _as_list(roi_head.mask_head):
        head.update(in_channels=WIDTH, conv_out_channels=WIDTH, num_convs=1)

    model.train_cfg.rpn.sampler.num = 64
    model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    for stage in _as_list(model.train_cfg.rcnn):
        stage.sampler.num = 16
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    # A barely trained detector is never sure of anything: keep its few best boxes all the same,
    # so that the mask head has something to do.
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)


def _shrink_pipeline(steps, detector):
    """Set every size in a pipeline, however deep its transforms are nested."""
    for step in steps:
        if isinstance(step, (list, tuple)):
            _shrink_pipeline(step, detector)
            continue
        if 'transforms' in step:
            _shrink_pipeline(step.transforms, detector)
        if 'scale' in step:
            step.scale = (LONG_SIDE, SHORT_SIDE if detector else CROP)
        if 'scales' in step:
            step.scales = [(LONG_SIDE, SHORT_SIDE), (LONG_SIDE, SHORT_SIDE - 32)]
        if 'crop_size' in step:
            step.crop_size = (48, SHORT_SIDE) if detector else (CROP, CROP)


def _as_list(value):
    return value if isinstance(value, list) else [value]
