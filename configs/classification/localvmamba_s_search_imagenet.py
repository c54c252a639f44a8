# The network in which LocalVMamba-S's directions are searched: a third of its width.
#   python tools/search_directions.py configs/classification/localvmamba_s_search_imagenet.py \
#       --into configs/upernet_localvmamba_s_ade20k.py
_base_ = './localvmamba_search_imagenet.py'

model = dict(backbone=dict(arch=dict(depths=(2, 2, 27, 2))))
