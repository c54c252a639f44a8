# AdamW for 60 000 iterations on ADE20K, a batch of 32, in float32.
_base_ = './ade20k_160k.py'

train_cfg = dict(max_iters=60000, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
optim_wrapper = dict(dtype=None)
auto_scale_lr = dict(base_batch_size=32)
