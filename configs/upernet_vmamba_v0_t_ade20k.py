# UperNet with VMamba-T of the first release on ADE20K.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = dict(
    name='vssmtiny_dp01_ckpt_epoch_292.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/'
    'vssmtiny_dp01_ckpt_epoch_292.pth')

model = dict(backbone=dict(arch='v0_tiny', drop_path_rate=0.3))
