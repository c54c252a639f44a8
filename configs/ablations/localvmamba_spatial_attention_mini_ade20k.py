# Rows and windows under the attention of the paper, which scales tokens too.
_base_ = './localvmamba_mini_ade20k.py'

model = dict(backbone=dict(directions='unsearched', attention='channel-spatial'))
