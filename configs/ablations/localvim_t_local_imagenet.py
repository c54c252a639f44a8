# Scans of windows of 2x2 in place of those along the rows.
_base_ = './localvim_t_horizontal_imagenet.py'

model = dict(backbone=dict(directions=[['w2', 'w2_flip']] * 24))
