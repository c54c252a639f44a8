# MambaVision-S on ImageNet; published weights: mambavision-s-1k. MESA, left out, had weight 1.
_base_ = './mambavision_t_imagenet.py'

model = dict(backbone=dict(arch='small'))

test_pipeline = [_base_.test_pipeline[0], dict(_base_.test_pipeline[1], crop_pct=0.93)]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
