# Mask R-CNN with LocalVim-T on COCO in the manner of ViTDet, 100 epochs of large-scale jittering,
# in float32; the paper's text calls it a Cascade Mask R-CNN.
_base_ = [
    './_base_/models/mask_rcnn_vitdet.py',
    './_base_/recipes/localvim_t_lsj.py',
]

model = _base_.localvim_t
