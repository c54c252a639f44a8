# Rows and windows under channel attention, as released.
_base_ = './localvmamba_mini_ade20k.py'

model = dict(backbone=dict(directions='unsearched', attention='channel'))
