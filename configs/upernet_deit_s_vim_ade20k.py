# UperNet with DeiT-S on ADE20K in the form of Vim's segmentor. Its published 43 M parameters are
# those with a position embedding for 1024 pixels.
_base_ = './upernet_deit_ti_vim_ade20k.py'

model = dict(
    backbone=dict(name='deit_small_patch16_224'),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(
    paramwise_cfg=dict(layer_decay=0.95), optimizer=dict(lr=1e-4, weight_decay=0.05))
