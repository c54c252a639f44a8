# UperNet with MambaVision-L3 on ADE20K at 640x640, from the 512-pixel ImageNet-21K weights.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k_640.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

# The released config names a "700m" file, which is not among the published ones.
published_checkpoint = 'mambavision-l3-512-21k'

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    # Effective drop path as in upernet_mambavision_t_ade20k.py; the released config says 0.8.
    backbone=dict(
        type='mmhybrid.MambaVision',
        arch='large3',
        window_size=(8, 8, 64, 32),
        drop_path_rate=0.2),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024))
optim_wrapper = dict(
    _delete_=True,  # float32: the published run found float16 unstable at this size
    type='OptimWrapper',
    constructor='mmhybrid.HybridOptimWrapperConstructor',
    paramwise_cfg=dict(no_decay='published'),
    optimizer=dict(type='AdamW', lr=8e-5, betas=(0.9, 0.999), weight_decay=0.05))
train_cfg = dict(val_interval=5000)
