# Vim-Ti+ on ImageNet: Vim-Ti fine-tuned on a grid of 8 pixels; published weights: vim-t-stride8.
_base_ = './vim_ti_imagenet.py'

published_checkpoint = 'vim-t'

model = dict(backbone=dict(stride=8))
train_cfg = dict(max_epochs=30)
param_scheduler = []  # the rate is constant
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
