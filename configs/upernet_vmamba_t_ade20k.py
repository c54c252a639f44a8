# UperNet with VMamba-T[s1l8] on ADE20K, 160k iterations, in float32.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

published_checkpoint = 'vmamba-t-s1l8'

model = dict(
    backbone=dict(type='mmhybrid.VMamba', arch='tiny_s1l8', drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(dtype=None, optimizer=dict(lr=6e-5))
