# Mask R-CNN with VMamba-S of the first release on COCO.
_base_ = './mask_rcnn_vmamba_v0_t_coco.py'

published_checkpoint = 'vmamba-v0-s'

model = dict(backbone=dict(arch='v0_small'))
