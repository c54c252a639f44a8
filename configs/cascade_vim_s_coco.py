# Cascade Mask R-CNN with Vim-S on COCO. The released config has rotary tables and sums directions
# without halving, for which no weights are public; this one fits those that are.
_base_ = './cascade_vim_ti_coco.py'

published_checkpoint = 'vim-s'

model = dict(
    backbone=dict(arch='small', rope=False, divide=True, dropped_row='middle'),
    neck=dict(backbone_channel=384))
