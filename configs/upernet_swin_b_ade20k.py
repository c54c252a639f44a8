# UperNet with Swin-B on ADE20K, as in mmseg.
_base_ = './upernet_swin_s_ade20k.py'

model = dict(
    backbone=dict(embed_dims=128, num_heads=(4, 8, 16, 32)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
