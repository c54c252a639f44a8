# UperNet with VMamba-S of the first release on ADE20K.
_base_ = './upernet_vmamba_v0_t_ade20k.py'

published_checkpoint = dict(
    name='vssmsmall_dp03_ckpt_epoch_238.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/'
    'vssmsmall_dp03_ckpt_epoch_238.pth')

model = dict(backbone=dict(arch='v0_small'))
