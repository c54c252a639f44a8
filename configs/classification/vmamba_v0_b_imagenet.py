# VMamba-B of the first release on ImageNet; published weights: vmamba-v0-b. Drop path is that of
# the paper and of the file's name; the released settings say 0.5.
_base_ = './vmamba_t_imagenet.py'

model = dict(backbone=dict(arch='v0_base', drop_path_rate=0.6))
