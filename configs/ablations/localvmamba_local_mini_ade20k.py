# Two scans of windows of 2x2 in place of rows.
_base_ = './localvmamba_mini_ade20k.py'

model = dict(backbone=dict(directions=[['w2', 'w2_flip']] * 7))
