# UperNet with VMamba-T of the first release on ADE20K.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = 'vmamba-v0-t'

model = dict(backbone=dict(arch='v0_tiny', drop_path_rate=0.3))
