# The small segmentor of upernet_mambavision_mini_ade20k.py with a small Vim on a grid of 8 pixels.
_base_ = './upernet_mambavision_mini_ade20k.py'

side = 96
model = dict(
    backbone=dict(
        _delete_=True, type='mmhybrid.Vim', arch=dict(dim=96, depth=4, state_dim=8),
        img_size=side, stride=8, out_indices=(0, 1, 2, 3), drop_path_rate=0.0),
    decode_head=dict(in_channels=[96, 96, 96, 96]),
    auxiliary_head=dict(in_channels=96))
