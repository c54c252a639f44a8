# UperNet with ConvNeXt-S on ADE20K, as in mmseg.
_base_ = './upernet_convnext_t_ade20k.py'

model = dict(backbone=dict(name='convnext_small', drop_path_rate=0.3))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={
    f'backbone.net.{name}': dict(lr_mult=0.9 ** (13 - layer))
    for name, layer in _base_.layers.items()
}))
