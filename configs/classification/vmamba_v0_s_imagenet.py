# VMamba-S of the first release on ImageNet; published weights: vmamba-v0-s.
_base_ = './vmamba_t_imagenet.py'

model = dict(backbone=dict(arch='v0_small', drop_path_rate=0.3))
