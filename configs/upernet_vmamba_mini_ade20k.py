# The small segmentor of upernet_mambavision_mini_ade20k.py with a small VMamba.
_base_ = './upernet_mambavision_mini_ade20k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmhybrid.VMamba',
        arch=dict(dim=32, depths=(1, 2, 2, 2), ssm_ratio=1.0, mlp_ratio=2),
        drop_path_rate=0.0))
