# LAMB for 310 epochs of cosine and 10 at its end on ImageNet, 128 images on each GPU.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=320, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    # The cosine counts from the first epoch, as in timm; factors multiply until the warm-up ends.
    dict(type='LinearLR', start_factor=2e-4, by_epoch=True, begin=0, end=21),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=311, T_max=310, eta_min=5e-6),
]

optim_wrapper = dict(
    type='mmhybrid.AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    clip_grad=dict(max_norm=5.0),
    constructor='mmhybrid.HybridOptimWrapperConstructor',
    paramwise_cfg=dict(no_decay='1d'),
    optimizer=dict(type='mmhybrid.Lamb', lr=5e-3, betas=(0.9, 0.999), weight_decay=0.05))

# The released scripts do not say on how many GPUs; 32 of them are our assumption.
auto_scale_lr = dict(enable=False, base_batch_size=4096)
