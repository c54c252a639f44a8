# Cascade Mask R-CNN with ResNet-101 on COCO; starts from torchvision://resnet101.
_base_ = './cascade_r50_coco.py'

model = dict(backbone=dict(depth=101))
