# Cascade Mask R-CNN with Swin-S on COCO.
_base_ = './cascade_swin_t_coco.py'

model = dict(backbone=dict(depths=(2, 2, 18, 2)))
