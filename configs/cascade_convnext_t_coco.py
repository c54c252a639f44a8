# Cascade Mask R-CNN with ConvNeXt-T on COCO, 36 epochs at many scales, as in mmdet.
_base_ = [
    './_base_/models/cascade_mask_rcnn.py',
    './_base_/datasets/coco_instance_ms.py',
    './_base_/schedules/coco_3x.py',
    './_base_/runtime_det.py',
    './_base_/models/convnext_t_layers.py',
]

model = dict(
    backbone=dict(type='mmhybrid.TimmFeatures', name='convnext_tiny', drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(
    paramwise_cfg=dict(no_decay='1d', custom_keys={
        f'backbone.net.{name}': dict(lr_mult=0.7 ** (7 - layer))
        for name, layer in _base_.layers.items()
    }),
    optimizer=dict(lr=2e-4))
