# UperNet with VMamba-B[s2l15] on ADE20K.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = 'vmamba-b-s2l15'

model = dict(
    backbone=dict(arch='base_s2l15', drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
