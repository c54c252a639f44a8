# LocalMamba's ablations on the generated mini ADE20K: what all of them share, and where they start,
# with Vim's two scans along the rows and no attention over directions.
_base_ = '../upernet_localvmamba_mini_ade20k.py'

iters = 400
blocks = 7

model = dict(backbone=dict(directions=[['h', 'h_flip']] * blocks, attention='none'))

train_cfg = dict(max_iters=iters, val_interval=iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=50, end=iters, T_max=iters - 50,
        eta_min_ratio=0.01),
]
default_hooks = dict(checkpoint=dict(interval=iters))
randomness = dict(seed=0)
