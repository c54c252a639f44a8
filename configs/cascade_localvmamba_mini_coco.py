# The small detector of cascade_vmamba_mini_coco.py with a small LocalVMamba.
_base_ = './cascade_vmamba_mini_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmhybrid.LocalVMamba',
        arch=dict(dim=32, depths=(1, 2, 2, 2), ssm_ratio=1.0, state_dim=4),
        directions=[['h', 'v_flip', 'w2', 'w7_flip'], ['h', 'v', 'w2_flip', 'w7']] * 3
        + [['h', 'v_flip', 'w2', 'w7_flip']],
        drop_path_rate=0.0))
