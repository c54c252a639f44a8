# UperNet with ConvNeXt-T on ADE20K, 160k iterations, as in mmseg.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(type='mmhybrid.TimmFeatures', name='convnext_tiny', drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
# mmseg's rates: one per stage, the lowest for the stem and all that leads to a stage.
layers = dict(
    {f'stages_{stage}.blocks': stage + 1 for stage in range(4)}, **{'stem_': 0, 'stages_': 0})
optim_wrapper = dict(
    paramwise_cfg=dict(no_decay='1d', custom_keys={
        f'backbone.net.{name}': dict(lr_mult=0.9 ** (7 - layer)) for name, layer in layers.items()
    }),
    optimizer=dict(lr=1e-4, weight_decay=0.05))
