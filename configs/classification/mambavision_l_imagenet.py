# MambaVision-L on ImageNet; published weights: mambavision-l-1k. MESA, left out, had weight 6.
_base_ = './mambavision_t_imagenet.py'

model = dict(backbone=dict(arch='large', drop_path_rate=0.3))
optim_wrapper = dict(optimizer=dict(weight_decay=0.12))
