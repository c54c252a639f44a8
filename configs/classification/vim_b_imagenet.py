# Vim-B on ImageNet; published weights: vim-b. To test with: no recipe of its training was released.
_base_ = './vim_s_imagenet.py'

model = dict(backbone=dict(arch='base'))
