# Mask R-CNN with VMamba-T of the first release on COCO, 36 epochs at many scales.
_base_ = './mask_rcnn_vmamba_t_3x_coco.py'

published_checkpoint = 'vmamba-v0-t'

model = dict(backbone=dict(arch='v0_tiny'))
