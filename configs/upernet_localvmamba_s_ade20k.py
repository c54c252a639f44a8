# UperNet with LocalVMamba-S on ADE20K; unlike the smaller one it is trained in mixed precision.
_base_ = './upernet_localvmamba_t_ade20k.py'

published_checkpoint = 'localvmamba-s'

model = dict(backbone=dict(arch='small', drop_path_rate=0.2))
optim_wrapper = dict(dtype='float16')
