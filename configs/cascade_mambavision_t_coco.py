# Cascade Mask R-CNN with MambaVision-T on COCO, 36 epochs at many scales.
_base_ = [
    './_base_/models/cascade_mask_rcnn.py',
    './_base_/datasets/coco_instance_ms.py',
    './_base_/schedules/coco_3x.py',
    './_base_/runtime_det.py',
]

published_checkpoint = 'mambavision-t-1k'

model = dict(
    backbone=dict(
        type='mmhybrid.MambaVision',
        arch='tiny',
        window_size=(8, 8, 112, 56),  # one window holds the whole map of a 1333x800 image
        # The released wrapper drops this argument, so every published detector trained with 0.2,
        # whatever its config said (T 0.2, S 0.3, B 0.5).
        drop_path_rate=0.2),
    neck=dict(in_channels=[80, 160, 320, 640]))
