# Cascade Mask R-CNN with Vim-Ti on COCO, with rates that fall by 0.7 from block to block: the
# released base config, of which cascade_vim_ti_coco.py is the "adj1" form.
_base_ = './cascade_vim_ti_coco.py'

optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.7))
