# Vim-Ti of the first release on ImageNet; published weights: vim-t-first. The recipe is that of the
# second.
_base_ = './vim_ti_imagenet.py'

model = dict(backbone=dict(class_token='first', rope=True, divide=False))
