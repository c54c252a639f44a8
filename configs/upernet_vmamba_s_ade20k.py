# UperNet with VMamba-S[s2l15] on ADE20K. The release has configs with crops of 640 and 896, too,
# but no results of them.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = dict(
    name='vssm_small_0229_ckpt_epoch_222.pth',
    url='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
    'vssm_small_0229_ckpt_epoch_222.pth')

model = dict(backbone=dict(arch='small_s2l15', drop_path_rate=0.3))
