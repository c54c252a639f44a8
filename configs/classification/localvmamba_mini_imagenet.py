# A small LocalVMamba classifier for the generated mini ImageNet: minutes on two CPU cores, and the
# cheapest network in which a search for directions can be tried. Make the data with
#   python tools/prepare_data.py mini-imagenet --root data/
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/runtime_cls.py',
]

data_root = 'data/mini_imagenet/'
side = 64
epochs = 12

model = dict(
    num_classes=5,
    label_smoothing=0.0,
    mixing=None,
    backbone=dict(
        type='mmhybrid.LocalVMambaClassifier',
        arch=dict(dim=24, depths=(1, 1, 2, 1), state_dim=8),
        directions='unsearched',
        drop_path_rate=0.0))

train_pipeline = [
    dict(type='mmhybrid.LoadPicture'),
    dict(type='mmhybrid.TimmTransform', is_training=True, input_size=side, scale=(0.6, 1.0)),
]
test_pipeline = [
    dict(type='mmhybrid.LoadPicture'),
    dict(type='mmhybrid.TimmTransform', input_size=side, crop_pct=1.0),
]
train_dataloader = dict(
    batch_size=20,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=epochs, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=0, end=epochs, T_max=epochs,
        eta_min_ratio=0.01, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(max_norm=5.0))
default_hooks = dict(logger=dict(interval=20))
auto_scale_lr = dict(base_batch_size=20)
