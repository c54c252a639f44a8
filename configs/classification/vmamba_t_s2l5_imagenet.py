# VMamba-T[s2l5] on ImageNet; published weights: vmamba-t-s2l5.
_base_ = './vmamba_t_imagenet.py'

model = dict(backbone=dict(arch='tiny_s2l5'))
