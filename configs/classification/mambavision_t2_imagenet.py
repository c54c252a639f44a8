# MambaVision-T2 on ImageNet; published weights: mambavision-t2-1k. MESA, left out, had weight 0.75.
_base_ = './mambavision_t_imagenet.py'

model = dict(backbone=dict(arch='tiny2'))

test_pipeline = [_base_.test_pipeline[0], dict(_base_.test_pipeline[1], crop_pct=0.98)]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
