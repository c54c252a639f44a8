# UperNet with LocalVMamba-T on ADE20K, 160k iterations, in float32. The file of classification
# weights that the released config starts from is missing from the release. Published results were
# tested with column scans put on wrong pixels; v_restore='released' does it too.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(type='mmhybrid.LocalVMamba', arch='tiny', drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(dtype=None, optimizer=dict(lr=6e-5))
