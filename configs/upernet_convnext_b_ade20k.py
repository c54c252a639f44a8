# UperNet with ConvNeXt-B on ADE20K, as in mmseg.
_base_ = './upernet_convnext_s_ade20k.py'

model = dict(
    backbone=dict(name='convnext_base', drop_path_rate=0.4),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
