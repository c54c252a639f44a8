# UperNet with Vim-S on ADE20K: features from the stream. The released config has rotary tables and
# sums directions without halving, for which no weights are public; this one fits those that are.
_base_ = './upernet_vim_ti_ade20k.py'

published_checkpoint = 'vim-s'

model = dict(
    backbone=dict(arch='small', feature='residual', last='add'),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={
        'backbone.patch_embed': dict(lr_mult=0.95 ** 25),
        'backbone.pos_embed': dict(lr_mult=0.95 ** 25),
    }),
    optimizer=dict(lr=1e-4, weight_decay=0.05))
