# Vim's ablation of directions: one scan in each block, forwards and backwards in turns.
_base_ = './localvim_t_horizontal_imagenet.py'

model = dict(backbone=dict(directions=[['h'], ['h_flip']] * 12, rope=False))
