# The small segmentor with windows of 2.2 times the map's side, where 64 and 32 equal theirs.
_base_ = './upernet_mambavision_mini_ade20k.py'

model = dict(backbone=dict(arch=dict(window_size=(8, 8, 13, 7))))
