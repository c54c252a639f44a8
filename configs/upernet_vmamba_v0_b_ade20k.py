# UperNet with VMamba-B of the first release on ADE20K. The released config
# starts from other weights, which were never published.
_base_ = './upernet_vmamba_v0_t_ade20k.py'

published_checkpoint = 'vmamba-v0-b'

model = dict(
    backbone=dict(arch='v0_base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
