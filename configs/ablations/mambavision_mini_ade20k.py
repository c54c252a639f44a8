# MambaVision's ablations on the generated mini ADE20K: what all of them share, and the design of
# the paper. Stages 3 and 4 have four blocks each, so that no two of its patterns are the same.
_base_ = '../upernet_mambavision_mini_ade20k.py'

iters = 400

model = dict(backbone=dict(arch=dict(depths=(1, 1, 4, 4))))

train_cfg = dict(max_iters=iters, val_interval=iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=50, end=iters, T_max=iters - 50,
        eta_min_ratio=0.01),
]
default_hooks = dict(checkpoint=dict(interval=iters))
randomness = dict(seed=0)
