# UperNet with LocalVim-S on ADE20K. Its classification weights were never published: the released
# config names the file of LocalVMamba-S, which does not fit.
_base_ = './upernet_localvim_t_ade20k.py'

published_checkpoint = None

model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384))
