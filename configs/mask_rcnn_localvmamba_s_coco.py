# Mask R-CNN with LocalVMamba-S on COCO.
_base_ = './mask_rcnn_localvmamba_t_coco.py'

published_checkpoint = dict(
    name='local_vssm_small.ckpt',
    url='https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vssm_small.ckpt',
    licence='Apache-2.0')

model = dict(backbone=dict(arch='small'))
