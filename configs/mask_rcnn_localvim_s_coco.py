# Mask R-CNN with LocalVim-S on COCO. Its classification weights were never published.
_base_ = './mask_rcnn_localvim_t_coco.py'

published_checkpoint = None

model = dict(backbone=dict(arch='small'), neck=dict(backbone_channel=384))
train_dataloader = dict(batch_size=1)  # on 64 GPUs
