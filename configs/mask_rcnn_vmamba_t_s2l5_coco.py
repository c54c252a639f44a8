# Mask R-CNN with VMamba-T[s2l5] on COCO.
_base_ = './mask_rcnn_vmamba_t_coco.py'

published_checkpoint = 'vmamba-t-s2l5'

model = dict(backbone=dict(arch='tiny_s2l5'))
