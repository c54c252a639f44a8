# Cascade Mask R-CNN with Swin-B on COCO; drop path is that of the segmentor.
_base_ = './cascade_swin_s_coco.py'

model = dict(
    backbone=dict(embed_dims=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]))
