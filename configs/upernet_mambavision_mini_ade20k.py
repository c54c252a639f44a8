# A small UperNet with MambaVision for the generated mini ADE20K: minutes on two CPU cores.
#
# The parts and their order are those of upernet_mambavision_t_ade20k.py; widths and the image are
# smaller. Make the data with
#   python tools/prepare_data.py mini-ade20k --root data/
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

data_root = 'data/mini_ade20k/ADEChallengeData2016/'
side = 96
width = 48
iters = 1100
norm = dict(type='GN', num_groups=8, requires_grad=True)

model = dict(
    data_preprocessor=dict(size=(side, side)),
    backbone=dict(
        type='mmhybrid.MambaVision',
        arch=dict(
            dim=32, stem_width=16, depths=(1, 2, 2, 2), num_heads=(1, 2, 4, 8),
            window_size=(8, 8, side // 16, side // 32), mlp_ratio=2),
        drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=width, dropout_ratio=0.0, norm_cfg=norm),
    auxiliary_head=dict(in_channels=128, channels=width, dropout_ratio=0.0, norm_cfg=norm))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(side, side)),
    dict(type='RandomFlip', prob=0.5),
    # The loss at the head's own resolution: at the image's, 150 classes take most of the time.
    dict(type='mmdet.SegRescale', scale_factor=0.25),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ]),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
custom_imports = dict(
    imports=['mmhybrid', 'mmhybrid.evaluation.present_iou'], allow_failed_imports=False)
val_evaluator = dict(type='mmhybrid.PresentIoUMetric')
test_evaluator = val_evaluator

train_cfg = dict(max_iters=iters, val_interval=iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=50, end=iters, T_max=iters - 50,
        eta_min_ratio=0.01),
]
optim_wrapper = dict(dtype=None, optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10.0))
default_hooks = dict(checkpoint=dict(interval=iters))
auto_scale_lr = dict(base_batch_size=16)
