# UperNet with MambaVision-S on ADE20K.
_base_ = './upernet_mambavision_t_ade20k.py'

published_checkpoint = 'mambavision-s-1k'

model = dict(
    backbone=dict(arch='small', window_size=(8, 8, 160, 56)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(lr=6e-5))
train_cfg = dict(val_interval=10000)
