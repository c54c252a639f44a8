# MambaVision-B on ImageNet; published weights: mambavision-b-21k. To test with: how they were
# trained on ImageNet-21K was not published.
_base_ = './mambavision_b_imagenet.py'
