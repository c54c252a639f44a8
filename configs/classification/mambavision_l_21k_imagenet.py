# MambaVision-L on ImageNet; published weights: mambavision-l-21k. To test with: how they were
# trained on ImageNet-21K was not published.
_base_ = './mambavision_l_imagenet.py'
