# VMamba-T[s1l8] on ImageNet; published weights: vmamba-t-s1l8.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet_inc1.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    mixing=dict(mixup_alpha=0.8),
    backbone=dict(type='mmhybrid.VMambaClassifier', arch='tiny_s1l8', drop_path_rate=0.2))
param_scheduler = [
    # from 1e-6, one step per iteration
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=20, end=300, T_max=280, eta_min=1e-5,
        convert_to_iter_based=True),
]
optim_wrapper = dict(
    type='mmhybrid.AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    clip_grad=dict(max_norm=5.0),
    optimizer=dict(weight_decay=0.05))
custom_hooks = [
    dict(type='mmhybrid.RandomStateHook'),
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=1e-4),
]
