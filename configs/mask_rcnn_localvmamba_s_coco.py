# Mask R-CNN with LocalVMamba-S on COCO.
_base_ = './mask_rcnn_localvmamba_t_coco.py'

published_checkpoint = 'localvmamba-s'

model = dict(backbone=dict(arch='small'))
