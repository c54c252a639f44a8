# UperNet with VMamba-T[s2l5] on ADE20K.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = 'vmamba-t-s2l5'

model = dict(backbone=dict(arch='tiny_s2l5'))
