# UperNet with MambaVision-T on ADE20K, 160k iterations.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

published_checkpoint = 'mambavision-t-1k'

model = dict(
    backbone=dict(
        type='mmhybrid.MambaVision',
        arch='tiny',
        window_size=(8, 8, 64, 32),
        # The released wrapper drops this argument, so every published segmentor trained with 0.2,
        # whatever its config said (T 0.3, S 0.7, B 0.4, L3 0.8).
        drop_path_rate=0.2),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320))
