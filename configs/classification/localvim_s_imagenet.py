# LocalVim-S on ImageNet. Its weights were never published. The released network has the directions
# of this one; the paper's has 'searched', the default.
_base_ = './localvim_t_imagenet.py'

model = dict(backbone=dict(arch='small', directions='unsearched'))
