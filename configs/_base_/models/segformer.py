# SegFormer's head of linear layers on four maps (Xie et al. 2021), tested on whole images.
# A config on top of this file states `backbone`, `decode_head.in_channels` and `num_classes`.
_base_ = './encoder_decoder.py'

model = dict(
    decode_head=dict(
        type='SegformerHead',
        in_index=[0, 1, 2, 3],
        channels=256,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
