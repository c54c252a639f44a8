# Mask R-CNN with MambaVision-T on COCO, 12 epochs at one scale. No such recipe was released:
# optimizer, windows and drop path are those of the Cascade Mask R-CNN.
_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/runtime_det.py',
]

published_checkpoint = 'mambavision-t-1k'

model = dict(
    backbone=dict(
        type='mmhybrid.MambaVision', arch='tiny', window_size=(8, 8, 112, 56), drop_path_rate=0.2),
    neck=dict(in_channels=[80, 160, 320, 640]))
