# Vim's ablation of directions: one scan in each block, always forwards.
_base_ = './localvim_t_horizontal_imagenet.py'

model = dict(backbone=dict(directions=[['h']] * 24, rope=False))
