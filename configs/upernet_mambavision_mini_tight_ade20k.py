# The small segmentor with windows that fit the map; to compare with ..._padded_ade20k.py.
_base_ = './upernet_mambavision_mini_padded_ade20k.py'

model = dict(backbone=dict(windows='tight'))
