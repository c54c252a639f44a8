# Mask R-CNN with Vim-Ti on COCO in the manner of ViTDet. No such recipe was released: backbone,
# data and optimizer are those of the Cascade Mask R-CNN.
_base_ = [
    './_base_/models/mask_rcnn_vitdet.py',
    './_base_/recipes/vim_ti_lsj.py',
]

model = _base_.vim_ti
