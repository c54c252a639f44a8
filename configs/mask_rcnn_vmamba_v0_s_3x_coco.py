# Mask R-CNN with VMamba-S of the first release on COCO, 36 epochs at many scales.
_base_ = './mask_rcnn_vmamba_v0_t_3x_coco.py'

published_checkpoint = dict(
    name='vssmsmall_dp03_ckpt_epoch_238.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/'
    'vssmsmall_dp03_ckpt_epoch_238.pth')

model = dict(backbone=dict(arch='v0_small'))
