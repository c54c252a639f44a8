# Attention in the last quarter of the blocks: MMMS.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(pattern='last-quarter'))
