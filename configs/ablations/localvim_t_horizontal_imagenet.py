# Where LocalMamba's ablation starts: the scans of Vim-T along the rows, 24 blocks of them, and no
# attention over directions. Unlike Vim itself it has no class token.
_base_ = '../classification/localvim_t_imagenet.py'

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, dim=192, depth=24),
        directions=[['h', 'h_flip']] * 24,
        attention='none'))
