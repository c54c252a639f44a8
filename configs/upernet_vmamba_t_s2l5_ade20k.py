# UperNet with VMamba-T[s2l5] on ADE20K.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = dict(
    name='vssm_tiny_0230_ckpt_epoch_262.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
    'vssm_tiny_0230_ckpt_epoch_262.pth')

model = dict(backbone=dict(arch='tiny_s2l5'))
