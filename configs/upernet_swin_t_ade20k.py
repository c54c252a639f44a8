# UperNet with Swin-T on ADE20K, 160k iterations, as in mmseg.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(type='mmseg.SwinTransformer', drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(custom_keys={'relative_position_bias_table': dict(decay_mult=0.0)}),
    optimizer=dict(lr=6e-5))
