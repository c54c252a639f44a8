# No second branch at all, which the paper leaves out.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(mixer_branch='none'))
