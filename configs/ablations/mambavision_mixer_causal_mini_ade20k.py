# Mamba's own mixer: causal convolution, a gate without convolution.
_base_ = './mambavision_mini_ade20k.py'

model = dict(backbone=dict(causal_mixer=True, mixer_branch='linear-gate'))
