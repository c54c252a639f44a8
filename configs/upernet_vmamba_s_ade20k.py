# UperNet with VMamba-S[s2l15] on ADE20K. The release has configs with crops of 640 and 896, too,
# but no results of them.
_base_ = './upernet_vmamba_t_ade20k.py'

published_checkpoint = 'vmamba-s-s2l15'

model = dict(backbone=dict(arch='small_s2l15', drop_path_rate=0.3))
