# Cascade Mask R-CNN with ConvNeXt-B on COCO, as in ConvNeXt's repository.
_base_ = './cascade_convnext_s_coco.py'

model = dict(
    backbone=dict(name='convnext_base', drop_path_rate=0.7),
    neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={
    f'backbone.net.{name}': dict(lr_mult=0.8 ** (13 - layer))
    for name, layer in _base_.layers.items()
}))
