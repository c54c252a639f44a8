# The second branch convolves, and is a gate.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(mixer_branch='gate'))
