# Cascade Mask R-CNN with MambaVision-S on COCO.
_base_ = './cascade_mambavision_t_coco.py'

published_checkpoint = 'mambavision-s-1k'

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[96, 192, 384, 768]))
