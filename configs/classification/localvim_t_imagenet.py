# LocalVim-T on ImageNet with the published directions; published weights: localvim-t. The paper
# averages weights (0.9999), the released settings do not.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(type='mmhybrid.LocalVimClassifier', arch='tiny', drop_path_rate=0.1))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0))))
