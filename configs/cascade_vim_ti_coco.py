# Cascade Mask R-CNN with Vim-Ti on COCO in the manner of ViTDet, 100 epochs of large-scale
# jittering.
_base_ = [
    './_base_/models/cascade_mask_rcnn_vitdet.py',
    './_base_/recipes/vim_ti_lsj.py',
]

model = _base_.vim_ti
