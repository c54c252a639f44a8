# LocalVMamba-S on ImageNet; published weights: localvmamba-s.
_base_ = './localvmamba_t_imagenet.py'

model = dict(backbone=dict(arch='small'))
