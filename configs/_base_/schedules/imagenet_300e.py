# AdamW for 300 epochs on ImageNet, a batch of 1024 (128 on each of 8 GPUs).
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # from 1e-7, one step per epoch, to the full rate of epoch 20, which the cosine starts from
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=21),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=20, end=300, T_max=280, eta_min=1e-6,
        convert_to_iter_based=True),
]

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmhybrid.HybridOptimWrapperConstructor',
    # The scan's A_log has two dimensions and the alphas of a search have four: they do decay, as
    # published.
    paramwise_cfg=dict(no_decay='1d'),
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.04))

auto_scale_lr = dict(enable=False, base_batch_size=1024)
