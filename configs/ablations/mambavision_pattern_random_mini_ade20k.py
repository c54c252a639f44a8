# Attention in half of the blocks, drawn at random.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(pattern='random'))
