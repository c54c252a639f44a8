# Mask R-CNN with ResNet-50 on COCO, 12 epochs at one scale, as in mmdet: SGD, in float32, starting
# from torchvision://resnet50.
_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/runtime_det.py',
]

model = dict(
    backbone=dict(type='mmdet.ResNet', depth=50, frozen_stages=1, norm_eval=True),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(no_decay=None),
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4))
