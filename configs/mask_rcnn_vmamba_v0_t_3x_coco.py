# Mask R-CNN with VMamba-T of the first release on COCO, 36 epochs at many scales.
_base_ = './mask_rcnn_vmamba_t_3x_coco.py'

published_checkpoint = dict(
    name='vssmtiny_dp01_ckpt_epoch_292.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/'
    'vssmtiny_dp01_ckpt_epoch_292.pth')

model = dict(backbone=dict(arch='v0_tiny'))
