# Cascade Mask R-CNN with DeiT-S on COCO in the manner of ViTDet.
_base_ = './cascade_deit_ti_coco.py'

model = dict(
    backbone=dict(name='deit_small_patch16_224'), neck=dict(backbone_channel=384))
