# VMamba-T of the first release on ImageNet; published weights: vmamba-v0-t. They are not averaged
# ones. Their file is called dp01 (drop path 0.1), the recipe says 0.2.
_base_ = './vmamba_t_imagenet.py'

model = dict(backbone=dict(arch='v0_tiny'))
