# UperNet with VMamba-B[s2l15] on ADE20K.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = dict(
    name='vssm_base_0229_ckpt_epoch_237.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
    'vssm_base_0229_ckpt_epoch_237.pth')

model = dict(
    backbone=dict(arch='base_s2l15', drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
