# UperNet with ResNet-101 on ADE20K, 160k iterations, as in mmseg: SGD, in float32, starting from
# open-mmlab://resnet101_v1c.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

model = dict(
    backbone=dict(
        type='mmseg.ResNetV1c', depth=101, norm_cfg=dict(type='SyncBN', requires_grad=True),
        contract_dilation=True),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=160000),
]
train_dataloader = dict(batch_size=4)  # on 4 GPUs
optim_wrapper = dict(
    dtype=None,
    paramwise_cfg=dict(no_decay=None),
    optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4))
