# ImageNet with RandAugment whose operations all grow with their magnitude.
_base_ = './imagenet.py'

train_pipeline = [
    _base_.train_pipeline[0],
    dict(_base_.train_pipeline[1], auto_augment='rand-m9-mstd0.5-inc1'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
