# AdamW for 184 375 iterations on COCO, a batch of 64: 100 epochs of ViTDet's recipe.
# A config on top of this file states the weight decay and what the learning rates depend on.
# Released runs exchanged gradients between GPUs in float16; these keep their type.
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=184375, val_interval=5000,
    dynamic_intervals=[(180001, 184375)])  # after the last full interval, validate at the end
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR', by_epoch=False, begin=0, end=184375, milestones=[163889, 177546],
        gamma=0.1),
]

optim_wrapper = dict(
    type='mmhybrid.AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    constructor='mmhybrid.HybridOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999)))

auto_scale_lr = dict(enable=False, base_batch_size=64)
