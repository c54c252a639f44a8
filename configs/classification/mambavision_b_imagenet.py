# MambaVision-B on ImageNet; published weights: mambavision-b-1k. MESA, left out, had weight 1 after
# 0.3 of the epochs.
_base_ = './mambavision_t_imagenet.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3))
param_scheduler = [
    dict(type='LinearLR', start_factor=2e-4, by_epoch=True, begin=0, end=36),
    _base_.param_scheduler[1],
]
optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
