# Mask R-CNN with VMamba-B[s2l15] on COCO.
_base_ = './mask_rcnn_vmamba_t_coco.py'

published_checkpoint = 'vmamba-b-s2l15'

model = dict(
    backbone=dict(arch='base_s2l15', drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]))
