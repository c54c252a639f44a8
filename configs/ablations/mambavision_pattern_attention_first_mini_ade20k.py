# Attention and scans in turns: SMSM.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(pattern='attention-first'))
