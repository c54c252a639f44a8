# VMamba-B[s1l20] on ImageNet; published weights: vmamba-b-s1l20.
_base_ = './vmamba_t_imagenet.py'

model = dict(backbone=dict(arch='base_s1l20', drop_path_rate=0.5))
