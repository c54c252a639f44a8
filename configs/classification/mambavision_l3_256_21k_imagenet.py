# MambaVision-L3 for 256 pixels on ImageNet; published weights: mambavision-l3-256-21k. To test
# with: how they were trained on ImageNet-21K was not published.
_base_ = './mambavision_l_imagenet.py'

side = 256
model = dict(backbone=dict(arch='large3', window_size=(8, 8, 16, 8), drop_path_rate=0.5))

train_pipeline = [_base_.train_pipeline[0], dict(_base_.train_pipeline[1], input_size=side)]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(_base_.test_pipeline[1], input_size=side, crop_pct=1.0),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
