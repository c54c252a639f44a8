# Mask R-CNN with VMamba-T[s2l5] on COCO, 36 epochs at many scales.
_base_ = './mask_rcnn_vmamba_t_3x_coco.py'

published_checkpoint = dict(
    name='vssm_tiny_0230_ckpt_epoch_262.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
    'vssm_tiny_0230_ckpt_epoch_262.pth')

model = dict(backbone=dict(arch='tiny_s2l5'))
