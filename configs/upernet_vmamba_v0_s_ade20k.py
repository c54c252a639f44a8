# UperNet with VMamba-S of the first release on ADE20K.
_base_ = './upernet_vmamba_v0_t_ade20k.py'

published_checkpoint = 'vmamba-v0-s'

model = dict(backbone=dict(arch='v0_small'))
