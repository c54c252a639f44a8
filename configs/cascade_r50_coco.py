# Cascade Mask R-CNN with ResNet-50 on COCO, 36 epochs at many scales, with heads and optimizer of
# the other peers; mmdet's own has smaller heads and SGD. It starts from torchvision://resnet50.
_base_ = './cascade_swin_t_coco.py'

model = dict(
    backbone=dict(
        _delete_=True, type='mmdet.ResNet', depth=50, frozen_stages=1, norm_eval=True),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True)))
