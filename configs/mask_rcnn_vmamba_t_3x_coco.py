# Mask R-CNN with VMamba-T[s1l8] on COCO, 36 epochs at many scales, in float32.
_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance_ms.py',
    './_base_/schedules/coco_3x.py',
    './_base_/runtime_det.py',
]

published_checkpoint = 'vmamba-t-s1l8'

model = dict(
    backbone=dict(type='mmhybrid.VMamba', arch='tiny_s1l8', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(dtype=None)
