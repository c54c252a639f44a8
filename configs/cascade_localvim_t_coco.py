# Cascade Mask R-CNN with LocalVim-T on COCO in the manner of ViTDet. No such recipe was released:
# data and optimizer are those of the Mask R-CNN, heads those of the published Vim detector.
_base_ = [
    './_base_/models/cascade_mask_rcnn_vitdet.py',
    './_base_/recipes/localvim_t_lsj.py',
]

model = _base_.localvim_t
