# Cascade Mask R-CNN with Vim-B on COCO. No such recipe was released. Its classification weights are
# public under the short name vim-b.
_base_ = './cascade_vim_s_coco.py'

published_checkpoint = None

model = dict(backbone=dict(arch='base'), neck=dict(backbone_channel=768))
