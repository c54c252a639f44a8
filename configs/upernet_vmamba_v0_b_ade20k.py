# UperNet with VMamba-B of the first release on ADE20K. The released config
# starts from other weights, which were never published.
_base_ = './upernet_vmamba_v0_t_ade20k.py'

published_checkpoint = dict(
    name='vssmbase_dp06_ckpt_epoch_241.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/'
    'vssmbase_dp06_ckpt_epoch_241.pth')

model = dict(
    backbone=dict(arch='v0_base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
