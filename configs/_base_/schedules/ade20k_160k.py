# AdamW for 160 000 iterations on ADE20K, a batch of 16.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]

optim_wrapper = dict(
    type='mmhybrid.AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    constructor='mmhybrid.HybridOptimWrapperConstructor',
    # What the released code exempts: only names with "norm". A_log, D, biases, the stem's and the
    # heads' BatchNorm do decay; no_decay='ssm' is what the model's authors marked.
    paramwise_cfg=dict(no_decay='published'),
    optimizer=dict(type='AdamW', lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01))

auto_scale_lr = dict(enable=False, base_batch_size=16)
