# Attention first: SSMM.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(pattern='first-half'))
