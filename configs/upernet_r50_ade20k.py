# UperNet with ResNet-50 on ADE20K, as in mmseg; starts from open-mmlab://resnet50_v1c.
_base_ = './upernet_r101_ade20k.py'

model = dict(backbone=dict(depth=50))
