# Cascade Mask R-CNN with MambaVision-B on COCO.
_base_ = './cascade_mambavision_t_coco.py'

published_checkpoint = dict(
    name='mambavision_base_1k.pth.tar',
    url='https://huggingface.co/nvidia/MambaVision-B-1K/resolve/main/mambavision_base_1k.pth.tar')

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
