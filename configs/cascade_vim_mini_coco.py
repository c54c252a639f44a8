# The small detector of cascade_vmamba_mini_coco.py with a small Vim on a grid of 8 pixels.
_base_ = './cascade_vmamba_mini_coco.py'

side = 160
model = dict(
    backbone=dict(
        _delete_=True, type='mmhybrid.Vim', arch=dict(dim=96, depth=4, state_dim=8),
        img_size=side, stride=8, out_indices=(0, 1, 2, 3), drop_path_rate=0.0),
    neck=dict(in_channels=[96, 96, 96, 96]))
