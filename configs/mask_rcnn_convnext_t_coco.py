# Mask R-CNN with ConvNeXt-T on COCO, 12 epochs at one scale. mmdet has it with 36 epochs at many
# scales; optimizer and drop path are the same.
_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/runtime_det.py',
    './_base_/models/convnext_t_layers.py',
]

model = dict(
    backbone=dict(type='mmhybrid.TimmFeatures', name='convnext_tiny', drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(
    paramwise_cfg=dict(no_decay='1d', custom_keys={
        f'backbone.net.{name}': dict(lr_mult=0.95 ** (7 - layer))
        for name, layer in _base_.layers.items()
    }))
