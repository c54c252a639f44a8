# MambaVision-L2 for 512 pixels on ImageNet; published weights: mambavision-l2-512-21k. To test
# with: how they were trained on ImageNet-21K was not published.
_base_ = './mambavision_l2_imagenet.py'

side = 512
model = dict(backbone=dict(window_size=(8, 8, 32, 16)))

train_pipeline = [_base_.train_pipeline[0], dict(_base_.train_pipeline[1], input_size=side)]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(_base_.test_pipeline[1], input_size=side, crop_pct=0.93, crop_mode='squash'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
