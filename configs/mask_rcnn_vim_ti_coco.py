# Mask R-CNN with Vim-Ti on COCO in the manner of ViTDet. No such recipe was released: backbone,
# data and optimizer are those of the Cascade Mask R-CNN.
_base_ = [
    './_base_/models/mask_rcnn_vitdet.py',
    './_base_/datasets/coco_lsj.py',
    './_base_/schedules/coco_lsj_100e.py',
    './_base_/runtime_det_iterations.py',
]

published_checkpoint = 'vim-t-first'

model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        type='mmhybrid.Vim', arch='tiny', img_size=1024, out_indices=(23,), pyramid=False,
        rope=True, divide=False, dropped_row='first', drop_path_rate=0.1),
    neck=dict(backbone_channel=192))
train_dataloader = dict(batch_size=16, dataset=dict(filter_cfg=dict(min_size=0)))
optim_wrapper = dict(
    paramwise_cfg=dict(
        layer_decay=0.837, custom_keys={'backbone.pos_embed': dict(decay_mult=0.0)}),
    optimizer=dict(weight_decay=0.1))
