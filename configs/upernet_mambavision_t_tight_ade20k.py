# The same segmentor with windows that fit the map: no padded token.
#
# Released weights of whole segmentors were trained with padded windows; start from those of the
# classifier.
_base_ = './upernet_mambavision_t_ade20k.py'

model = dict(backbone=dict(windows='tight'))
