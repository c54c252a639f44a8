# Mask R-CNN with VMamba-S[s2l15] on COCO.
_base_ = './mask_rcnn_vmamba_t_coco.py'

published_checkpoint = 'vmamba-s-s2l15'

model = dict(backbone=dict(arch='small_s2l15', drop_path_rate=0.3))
