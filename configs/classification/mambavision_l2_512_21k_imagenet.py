# MambaVision-L2 for 512 pixels on ImageNet; published weights: mambavision-l2-512-21k. To test
# with: how they were trained on ImageNet-21K was not published.
_base_ = './mambavision_l3_512_21k_imagenet.py'

model = dict(backbone=dict(arch='large2', drop_path_rate=0.3))
