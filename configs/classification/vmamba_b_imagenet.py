# VMamba-B[s2l15] on ImageNet; published weights: vmamba-b-s2l15.
_base_ = './vmamba_t_imagenet.py'

model = dict(backbone=dict(arch='base_s2l15', drop_path_rate=0.6))
