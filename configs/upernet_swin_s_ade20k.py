# UperNet with Swin-S on ADE20K, as in mmseg.
_base_ = './upernet_swin_t_ade20k.py'

model = dict(backbone=dict(depths=(2, 2, 18, 2)))
