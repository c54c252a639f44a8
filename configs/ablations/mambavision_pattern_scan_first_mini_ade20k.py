# Scans and attention in turns: MSMS.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(pattern='scan-first'))
