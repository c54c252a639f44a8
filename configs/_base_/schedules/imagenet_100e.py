# The 300 epochs shortened to 100, for searches.
_base_ = './imagenet_300e.py'

train_cfg = dict(max_epochs=100)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=21),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=20, end=100, T_max=80, eta_min=1e-6,
        convert_to_iter_based=True),
]
