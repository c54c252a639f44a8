# MambaVision-T on ImageNet; published weights: mambavision-t-1k. Training lacks the released
# self-distillation (MESA, weight 0.5 after a quarter of the epochs).
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_inc1.py',
    '../_base_/schedules/imagenet_lamb_320e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    mixing=dict(mixup_alpha=0.8),
    backbone=dict(type='mmhybrid.MambaVisionClassifier', arch='tiny', drop_path_rate=0.2))
custom_hooks = [
    dict(type='mmhybrid.RandomStateHook'),
    dict(
        type='EMAHook', ema_type='ExponentialMovingAverage', momentum=2e-4, update_buffers=True),
]

test_pipeline = [_base_.test_pipeline[0], dict(_base_.test_pipeline[1], crop_pct=1.0)]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
