# The network in which LocalVMamba-T's directions are searched: a third of its width.
#   python tools/search_directions.py configs/classification/localvmamba_search_imagenet.py \
#       --into configs/upernet_localvmamba_t_ade20k.py
_base_ = [
    '../_base_/models/image_classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(
        type='mmhybrid.LocalVMambaClassifier',
        arch=dict(dim=32, depths=(2, 2, 9, 2)),
        directions=None,
        drop_path_rate=0.1))
