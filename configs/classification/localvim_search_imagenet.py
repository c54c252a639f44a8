# The network in which LocalVim's directions are searched: LocalVim-T, but 128 wide.
#   python tools/search_directions.py configs/classification/localvim_search_imagenet.py \
#       --into configs/upernet_localvim_t_ade20k.py
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(
        type='mmhybrid.LocalVimClassifier',
        arch=dict(dim=128, depth=20),
        directions=None,
        drop_path_rate=0.1))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0))))
