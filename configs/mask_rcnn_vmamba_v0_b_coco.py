# Mask R-CNN with VMamba-B of the first release on COCO. The released config
# starts from other weights, which were never published.
_base_ = './mask_rcnn_vmamba_v0_t_coco.py'

published_checkpoint = 'vmamba-v0-b'

model = dict(backbone=dict(arch='v0_base'), neck=dict(in_channels=[128, 256, 512, 1024]))
train_dataloader = dict(batch_size=1)  # on 16 GPUs
