# UperNet with MambaVision-T on ADE20K, 160k iterations.
_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/runtime_seg.py',
]

published_checkpoint = dict(
    name='mambavision_tiny_1k.pth.tar',
    url='https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar',
    licence='CC-BY-NC-SA-4.0')

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
