# Mask R-CNN with LocalVim-T on COCO in the manner of ViTDet, 100 epochs of large-scale jittering,
# in float32; the paper's text calls it a Cascade Mask R-CNN.
_base_ = [
    './_base_/models/mask_rcnn_vitdet.py',
    './_base_/datasets/coco_lsj.py',
    './_base_/schedules/coco_lsj_100e.py',
    './_base_/runtime_det_iterations.py',
]

published_checkpoint = 'localvim-t'

model = dict(
    data_preprocessor=dict(
        type='mmhybrid.ColourPadPreprocessor', pad_colour=(114, 114, 114), pad_size_divisor=1024),
    backbone=dict(
        type='mmhybrid.LocalVim', arch='tiny', img_size=1024, out_indices=(19,),
        drop_path_rate=0.1),
    neck=dict(backbone_channel=192))
train_dataloader = dict(batch_size=2)  # on 32 GPUs
optim_wrapper = dict(
    dtype=None,
    clip_grad=dict(max_norm=35, norm_type=2),
    # The released rule of 0.7 per layer looks for other names than LocalVim has: it reaches the
    # embedding only. `layer_decay=0.7` in place of custom_keys is what it was meant to be.
    paramwise_cfg=dict(custom_keys={
        'backbone.patch_embed': dict(lr_mult=0.7 ** 13),
        'backbone.pos_embed': dict(lr_mult=0.7 ** 13, decay_mult=0.0),
    }),
    optimizer=dict(weight_decay=0.05))
