# Cascade Mask R-CNN with Swin-T on COCO, 36 epochs at many scales; not among mmdet's own. Optimizer
# and drop path are those of the Mask R-CNN.
_base_ = [
    './_base_/models/cascade_mask_rcnn.py',
    './_base_/datasets/coco_instance_ms.py',
    './_base_/schedules/coco_3x.py',
    './_base_/runtime_det.py',
]

model = dict(
    backbone=dict(type='mmdet.SwinTransformer', drop_path_rate=0.2, convert_weights=True),
    neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(custom_keys={'relative_position_bias_table': dict(decay_mult=0.0)}))
