# Vim-Ti on ImageNet in float32; published weights: vim-t.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_inc1.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    mixing=dict(mixup_alpha=0.8),
    backbone=dict(type='mmhybrid.VimClassifier', arch='tiny', drop_path_rate=0.0))
train_dataloader = dict(sampler=dict(_delete_=True, type='mmhybrid.RepeatedAugmentSampler'))
param_scheduler = [
    # From 1e-6, steps per epoch. The cosine counts from the first epoch, as in timm.
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=6),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=300, T_max=300, eta_min=1e-5),
]
optim_wrapper = dict(
    # all else that is exempt has one dimension
    paramwise_cfg=dict(custom_keys=dict(
        pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0))),
    optimizer=dict(weight_decay=0.1))
custom_hooks = [
    dict(type='mmhybrid.RandomStateHook'),
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=4e-5),
]
