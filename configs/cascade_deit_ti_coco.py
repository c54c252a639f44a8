# Cascade Mask R-CNN with DeiT-Ti on COCO in the manner of ViTDet, to compare with Vim; every block
# attends to the whole map. How it was trained is not public: settings are those of Vim's detector,
# with rates that fall as much over 12 blocks as Vim's do over 24.
_base_ = './cascade_vim_ti_coco.py'

published_checkpoint = None

model = dict(
    backbone=dict(
        _delete_=True, type='mmhybrid.TimmFeatures', name='deit_tiny_patch16_224',
        out_indices=(11,), out_norm=False, drop_path_rate=0.1, settings=dict(img_size=1024)))
optim_wrapper = dict(paramwise_cfg=dict(
    layer_decay=0.7,
    custom_keys=dict(
        _delete_=True, **{'backbone.net.model.pos_embed': dict(decay_mult=0.0)})))
