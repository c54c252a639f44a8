# The small detector with windows that fit the map; to compare with ..._padded_coco.py.
_base_ = './cascade_mambavision_mini_padded_coco.py'

model = dict(backbone=dict(windows='tight'))
