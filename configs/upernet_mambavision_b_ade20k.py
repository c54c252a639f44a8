# UperNet with MambaVision-B on ADE20K.
_base_ = './upernet_mambavision_t_ade20k.py'

published_checkpoint = dict(
    name='mambavision_base_1k.pth.tar',
    url='https://huggingface.co/nvidia/MambaVision-B-1K/resolve/main/mambavision_base_1k.pth.tar')

model = dict(
    backbone=dict(arch='base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
train_cfg = dict(val_interval=10000)
