"""Make any config of ours small enough for a CPU test, without changing what it is made of.

Every test that trains or tests a real config goes through :func:`shrink`, so that "small" means one
thing. Kept: the model's parts and their order, the backbone's widths and kinds of blocks, the
datasets, the pipelines, the schedule and the optimizer. Reduced: image size, windows, the number of
blocks, RoI and proposal counts, head widths and convolutions, batch and worker counts.
"""

import importlib
from contextlib import contextmanager
from copy import deepcopy
from unittest import mock

import torch
from mmengine.config import Config

LONG_SIDE = 128  # of a detector's image
SHORT_SIDE = 96
CROP = 64  # side of a segmentor's training image
WIDTH = 32  # channels of necks and heads
MANY_PARAMETERS = 200_000_000
# The fewest blocks that hold one of each kind and one that follows its like.
STAGES = (1, 1, 2, 1)
BLOCKS = 3
LOCAL = [('h', 'h_flip', 'w2', 'w7_flip'), ('v', 'v_flip', 'w2_flip', 'w7')]


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
        if model.test_cfg.mode == 'slide':
            model.test_cfg.update(crop_size=(CROP, CROP), stride=(CROP * 2 // 3, CROP * 2 // 3))
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
    family = backbone.type.rpartition('.')[2]
    if family == 'MambaVision':
        # Windows of exactly the size of the stage's map: one window per image and no padding.
        backbone.window_size = (8, 8, side // 16, side // 32)
    if 'img_size' in backbone:
        backbone.img_size = side
    if family == 'TimmFeatures' and 'deit' in backbone.name:
        backbone.settings = dict(depth=BLOCKS + 1, img_size=side)
        backbone.out_indices = tuple(range(4)) if len(backbone.out_indices) == 4 else (BLOCKS,)
    elif family == 'TimmFeatures':
        backbone.settings = dict(depths=STAGES)
    elif family == 'SwinTransformer':
        backbone.depths = STAGES
    elif family == 'VisionTransformer':
        backbone.update(num_layers=4, out_indices=(0, 1, 2, 3), img_size=(side, side))
    elif isinstance(backbone.get('arch'), str):
        known = importlib.import_module(f'mmhybrid.models.backbones.{family.lower()}')
        arch = dict(known.ARCHITECTURES[backbone.arch])
        if 'depths' in arch:
            arch['depths'] = STAGES
            blocks = sum(STAGES)
        else:
            arch['depth'] = blocks = BLOCKS + 1
            whole = len(backbone.get('out_indices', range(4))) == 4
            backbone.out_indices = tuple(range(4)) if whole else (BLOCKS,)
        if family.startswith('Local'):
            # All eight directions, four in each block.
            backbone.directions = [LOCAL[index % len(LOCAL)] for index in range(blocks)]
        backbone.arch = arch


def _shrink_detector(model):
    model.neck.out_channels = WIDTH
    if model.data_preprocessor.pad_size_divisor > LONG_SIDE:
        model.data_preprocessor.pad_size_divisor = LONG_SIDE
    model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)

    roi_head = model.roi_head
    roi_head.bbox_roi_extractor.out_channels = WIDTH
    roi_head.mask_roi_extractor.out_channels = WIDTH
    for head in _as_list(roi_head.bbox_head):
        head.update(in_channels=WIDTH, fc_out_channels=2 * WIDTH)
        if 'conv_out_channels' in head:
            head.conv_out_channels = WIDTH
        if 'num_shared_convs' in head:
            head.num_shared_convs = 1
    for head in _as_list(roi_head.mask_head):
        head.update(in_channels=WIDTH, conv_out_channels=WIDTH, num_convs=1)

    model.train_cfg.rpn.sampler.num = 64
    model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    for stage in _as_list(model.train_cfg.rcnn):
        if 'num' in stage.sampler:
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


@contextmanager
def on_meta():
    """Build models without memory and without computing their initial values.

    Swin asks for the elements of a linspace, which meta tensors do not have.
    """
    linspace = torch.linspace
    initial = {name: (lambda tensor, *args, **kwargs: tensor) for name in dir(torch.nn.init)
               if name.endswith('_') and not name.startswith('_')}
    with mock.patch.multiple(torch.nn.init, **initial), mock.patch.object(
            torch, 'linspace', lambda *args, **kwargs: linspace(*args, **dict(
                kwargs, device='cpu'))), torch.device('meta'):
        yield


def _as_list(value):
    return value if isinstance(value, list) else [value]
