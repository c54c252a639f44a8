# Vim-S on ImageNet in float32; published weights: vim-s.
_base_ = './vim_ti_imagenet.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.05))
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=512)
