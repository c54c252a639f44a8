# Mask R-CNN with Swin-T on COCO, 12 epochs at one scale, as in mmdet. The recipe starts from
# https://github.com/SwinTransformer/storage/releases/download/v1.0.0/
# swin_tiny_patch4_window7_224.pth
_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/runtime_det.py',
]

model = dict(
    backbone=dict(type='mmdet.SwinTransformer', drop_path_rate=0.2, convert_weights=True),
    neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(custom_keys={'relative_position_bias_table': dict(decay_mult=0.0)}))
