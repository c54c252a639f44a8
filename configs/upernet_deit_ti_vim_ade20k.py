# UperNet with DeiT-Ti on ADE20K in the form of Vim's segmentor. How it was trained is not public:
# settings are those of Vim's, whose rule of rates by layer does find DeiT's blocks.
_base_ = './upernet_vim_ti_ade20k.py'

published_checkpoint = None

model = dict(
    backbone=dict(
        _delete_=True, type='mmhybrid.TimmFeatures', name='deit_tiny_patch16_224',
        out_indices=(2, 5, 8, 11), out_norm=False, drop_path_rate=0.1,
        settings=dict(img_size=512)),
    neck=dict(
        type='mmseg.Feature2Pyramid', embed_dim=192, rescales=[4, 2, 1, 0.5],
        norm_cfg=dict(type='SyncBN', requires_grad=True)))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.92, custom_keys=dict(_delete_=True)))
