# The small detector with windows of 2.2 times the map's side, as 112 and 56 are in the full one.
_base_ = './cascade_mambavision_mini_coco.py'

model = dict(backbone=dict(arch=dict(window_size=(8, 8, 22, 11))))
