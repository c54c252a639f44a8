# Cascade Mask R-CNN with ConvNeXt-S on COCO, as in mmdet.
_base_ = './cascade_convnext_t_coco.py'

model = dict(backbone=dict(name='convnext_small', drop_path_rate=0.6))
rate = 0.7
layers = dict(
    {f'stages_2.blocks.{block}': 3 + block // 3 for block in range(27)},
    **{'stem_': 0, 'stages_0': 1, 'stages_1': 2, 'stages_2': 3, 'stages_3': 12})
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={
    f'backbone.net.{name}': dict(lr_mult=rate ** (13 - layer)) for name, layer in layers.items()
}))
