# Vim-Ti in the manner of ViTDet: everything but the head, and what the head's config takes as its
# `model`. The published run started from weights that were never released; nearest to them are
# those of the first release, whose switches (rotary tables, no halving) are the released config's.
_base_ = [
    '../datasets/coco_lsj.py',
    '../schedules/coco_lsj_100e.py',
    '../runtime_det_iterations.py',
]

published_checkpoint = 'vim-t-first'

vim_ti = dict(
    data_preprocessor=dict(pad_size_divisor=1024),  # with the mean colour, after normalisation
    backbone=dict(
        type='mmhybrid.Vim', arch='tiny', img_size=1024, out_indices=(23,), pyramid=False,
        rope=True, divide=False, dropped_row='first', drop_path_rate=0.1),
    neck=dict(backbone_channel=192))
train_dataloader = dict(  # on 4 GPUs; detectron2 leaves no small image out
    batch_size=16, dataset=dict(filter_cfg=dict(min_size=0)))
optim_wrapper = dict(
    # Only the position embedding is spared: norms, A_log, D and biases decay.
    paramwise_cfg=dict(
        layer_decay=0.837, custom_keys={'backbone.pos_embed': dict(decay_mult=0.0)}),
    optimizer=dict(weight_decay=0.1))
