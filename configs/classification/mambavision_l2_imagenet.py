# MambaVision-L2 on ImageNet; published weights: mambavision-l2-1k. MESA, left out, had weight 6.
_base_ = './mambavision_l_imagenet.py'

model = dict(backbone=dict(arch='large2'))
