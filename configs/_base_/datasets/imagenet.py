# ImageNet-1k as one folder per class: train/<class>/*.JPEG, val/<class>/*.JPEG. 224 pixels.
data_root = 'data/imagenet/'

train_pipeline = [
    dict(type='mmhybrid.LoadPicture'),
    dict(
        type='mmhybrid.TimmTransform',
        is_training=True,
        auto_augment='rand-m9-mstd0.5',
        interpolation='bicubic',
        re_prob=0.25,
        re_mode='pixel'),
]
test_pipeline = [
    dict(type='mmhybrid.LoadPicture'),
    # the short side to 256 pixels, then the middle 224
    dict(type='mmhybrid.TimmTransform', interpolation='bicubic', crop_pct=0.875),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmhybrid.ImageFolder',
        data_root=data_root,
        data_prefix=dict(img_path='train'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmhybrid.ImageFolder',
        data_root=data_root,
        data_prefix=dict(img_path='val'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='mmhybrid.TopAccuracy', topk=(1, 5))
test_evaluator = val_evaluator
