# A small Cascade Mask R-CNN with MambaVision for the generated mini COCO: minutes on two CPU cores.
#
# The parts and their order are those of cascade_mambavision_t_coco.py; widths, the image and the
# numbers of anchors, proposals and RoIs are smaller. Make the data with
#   python tools/prepare_data.py mini-coco --root data/
_base_ = [
    './_base_/models/cascade_mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_3x.py',
    './_base_/runtime_det.py',
]

data_root = 'data/mini_coco/'
side = 160
width = 48
epochs = 12
norm = dict(type='GN', num_groups=8, requires_grad=True)

box_heads = [
    dict(
        type='ConvFCBBoxHead',
        num_shared_convs=1,
        num_shared_fcs=1,
        in_channels=width,
        conv_out_channels=width,
        fc_out_channels=128,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=stds),
        reg_class_agnostic=True,
        reg_decoded_bbox=True,
        norm_cfg=norm,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]

rcnn_stages = [
    dict(stage, sampler=dict(stage['sampler'], num=16, pos_fraction=0.5))
    for stage in _base_.model.train_cfg.rcnn
]

model = dict(
    backbone=dict(
        type='mmhybrid.MambaVision',
        arch=dict(
            dim=32, stem_width=16, depths=(1, 2, 2, 2), num_heads=(1, 2, 4, 8),
            window_size=(8, 8, side // 16, side // 32), mlp_ratio=2),
        drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[5], ratios=[1.0], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=width, finest_scale=28,
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2)),
        bbox_head=box_heads,
        mask_roi_extractor=dict(
            out_channels=width, finest_scale=56,
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=2)),
        mask_head=dict(
            num_convs=2, in_channels=width, conv_out_channels=width, class_agnostic=True)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=64),
        rcnn=rcnn_stages),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=64),
        rcnn=dict(max_per_img=20)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(side, side), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
# Those of coco_instance.py, at another scale.
test_pipeline = [
    _base_.test_pipeline[0],
    dict(_base_.test_pipeline[1], scale=(side, side)),
    *_base_.test_pipeline[2:],
]
tta_pipeline = [
    _base_.tta_pipeline[0],
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(_base_.test_pipeline[1], scale=(side, side))],
            *_base_.tta_pipeline[1]['transforms'][1:],
        ]),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=epochs, val_interval=epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(
        type='CosineAnnealingLR', by_epoch=True, begin=0, end=epochs, T_max=epochs,
        eta_min_ratio=0.01, convert_to_iter_based=True),
]
optim_wrapper = dict(
    dtype=None, optimizer=dict(lr=2e-3, fused=True), clip_grad=dict(max_norm=10.0))
auto_scale_lr = dict(base_batch_size=8)
