# LocalVim-T with a class token in the middle on ImageNet; published weights: localvim-t-middle.
_base_ = './localvim_t_imagenet.py'

model = dict(backbone=dict(class_token=True))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(cls_token=dict(decay_mult=0.0))))
