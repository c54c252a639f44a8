# LocalVMamba-T on ImageNet. Its weights are missing from the release. The network's own drop path
# is 0.2, but the released tool always passes on its command line's, which nobody has published.
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_300e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(type='mmhybrid.LocalVMambaClassifier', arch='tiny', drop_path_rate=0.2))
optim_wrapper = dict(
    type='mmhybrid.AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
