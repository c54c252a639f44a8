# UperNet with LocalVim-T on ADE20K, 160k iterations, in float32: four maps of stride 16, no neck.
# Published results were tested with column scans put on wrong tokens of maps that are not square;
# v_restore='released' does it too.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

published_checkpoint = 'localvim-t'

model = dict(
    backbone=dict(type='mmhybrid.LocalVim', arch='tiny', img_size=512, drop_path_rate=0.1),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3))
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(custom_keys={'backbone.pos_embed': dict(decay_mult=0.0)}),
    optimizer=dict(lr=6e-5))
