# LocalVim-T in the manner of ViTDet, in float32: everything but the head, and what the head's
# config takes as its `model`.
_base_ = [
    '../datasets/coco_lsj.py',
    '../schedules/coco_lsj_100e.py',
    '../runtime_det_iterations.py',
]

published_checkpoint = 'localvim-t'

localvim_t = dict(
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
