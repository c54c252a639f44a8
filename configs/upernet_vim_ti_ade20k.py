# UperNet with Vim-Ti on ADE20K, 60k iterations. Features are the mixers' outputs, not the stream.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_60k.py',
    './_base_/runtime_seg.py',
]

published_checkpoint = 'vim-t'

model = dict(
    backbone=dict(
        type='mmhybrid.Vim', arch='tiny', img_size=512, feature='mixer', drop_path_rate=0.1),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
train_dataloader = dict(batch_size=8)  # on 4 GPUs
optim_wrapper = dict(
    # The released rule of 0.92 per layer looks for other names than Vim has: it reaches the
    # embedding only. `layer_decay=0.92` in place of custom_keys is what it was meant to be.
    paramwise_cfg=dict(no_decay='1d', custom_keys={
        'backbone.patch_embed': dict(lr_mult=0.92 ** 25),
        'backbone.pos_embed': dict(lr_mult=0.92 ** 25),
    }),
    optimizer=dict(lr=2e-4, weight_decay=0.1))
default_hooks = dict(checkpoint=dict(interval=1000, save_best='mIoU'))
