# Mask R-CNN with LocalVMamba-S on COCO, 36 epochs at many scales.
_base_ = './mask_rcnn_localvmamba_t_3x_coco.py'

published_checkpoint = 'localvmamba-s'

model = dict(backbone=dict(arch='small'))
