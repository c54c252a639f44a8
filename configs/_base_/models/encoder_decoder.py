# What the segmentors have in common; they build on this file.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(512, 512),  # training only: a crop smaller than this is padded; tests never pad
        pad_val=0,
        seg_pad_val=255))
