# AdamW for 12 epochs on COCO, a batch of 16 (2 on each of 8 GPUs).
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

optim_wrapper = dict(
    type='mmhybrid.AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    constructor='mmhybrid.HybridOptimWrapperConstructor',
    # What the released code exempts: only names with "norm". A_log, D, biases and the stem's
    # BatchNorm do decay; no_decay='ssm' is what the model's authors marked.
    paramwise_cfg=dict(no_decay='published'),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05))

auto_scale_lr = dict(enable=False, base_batch_size=16)
