# UperNet with LocalVMamba-S on ADE20K; unlike the smaller one it is trained in mixed precision.
_base_ = './upernet_localvmamba_t_ade20k.py'

published_checkpoint = dict(
    name='local_vssm_small.ckpt',
    url='https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vssm_small.ckpt',
    licence='Apache-2.0')

model = dict(backbone=dict(arch='small', drop_path_rate=0.2))
optim_wrapper = dict(dtype='float16')
