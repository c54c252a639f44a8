# Cascade Mask R-CNN with MambaVision-B on COCO.
_base_ = './cascade_mambavision_t_coco.py'

published_checkpoint = 'mambavision-b-1k'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
