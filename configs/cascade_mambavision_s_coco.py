# Cascade Mask R-CNN with MambaVision-S on COCO.
_base_ = './cascade_mambavision_t_coco.py'

published_checkpoint = dict(
    name='mambavision_small_1k.pth.tar',
    url='https://huggingface.co/nvidia/MambaVision-S-1K/resolve/main/mambavision_small_1k.pth.tar')

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[96, 192, 384, 768]))
