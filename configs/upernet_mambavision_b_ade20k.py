# UperNet with MambaVision-B on ADE20K.
_base_ = './upernet_mambavision_t_ade20k.py'

published_checkpoint = 'mambavision-b-1k'

model = dict(
    backbone=dict(arch='base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
train_cfg = dict(val_interval=10000)
