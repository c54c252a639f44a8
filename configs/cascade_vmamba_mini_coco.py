# The small detector of cascade_mambavision_mini_coco.py with a small VMamba, which learns more
# slowly: it has no convolutional stages.
_base_ = './cascade_mambavision_mini_coco.py'

epochs = 16

rcnn_stages = [
    dict(stage, sampler=dict(stage['sampler'], num=32, pos_fraction=0.25))
    for stage in _base_.rcnn_stages
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmhybrid.VMamba',
        arch=dict(dim=32, depths=(1, 2, 2, 2), ssm_ratio=1.0, mlp_ratio=2),
        drop_path_rate=0.0),
    train_cfg=dict(rcnn=rcnn_stages))

train_cfg = dict(max_epochs=epochs, val_interval=epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=0, end=epochs, T_max=epochs,
        eta_min_ratio=0.01, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=2e-3))
