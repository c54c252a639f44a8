# A convolution that sees both sides, and still the gate without convolution.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(mixer_branch='linear-gate'))
