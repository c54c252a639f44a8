# UperNet with DeiT-S on ADE20K, 160k iterations, as in mmseg: its maps brought to four strides.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        type='mmseg.VisionTransformer', img_size=(512, 512), embed_dims=384, num_layers=12,
        num_heads=6, out_indices=(2, 5, 8, 11), drop_path_rate=0.1, interpolate_mode='bicubic',
        norm_cfg=dict(type='LN', eps=1e-6)),
    neck=dict(
        type='mmseg.MultiLevelNeck', in_channels=[384, 384, 384, 384], out_channels=384,
        scales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384, in_index=3))
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(custom_keys={
        'pos_embed': dict(decay_mult=0.0),
        'cls_token': dict(decay_mult=0.0),
    }),
    optimizer=dict(lr=6e-5))
