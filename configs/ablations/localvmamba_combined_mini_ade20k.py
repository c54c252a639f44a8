# Rows and windows together.
_base_ = './localvmamba_mini_ade20k.py'

model = dict(backbone=dict(directions='unsearched'))
