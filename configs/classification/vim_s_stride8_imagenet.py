# Vim-S+ on ImageNet: Vim-S fine-tuned on a grid of 8 pixels; published weights: vim-s-stride8.
_base_ = './vim_ti_stride8_imagenet.py'

published_checkpoint = 'vim-s'

model = dict(backbone=dict(arch='small'))
