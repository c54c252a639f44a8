# Mask R-CNN with LocalVMamba-T on COCO, 12 epochs at one scale. The file of classification weights
# that the released config starts from is missing from the release. The published networks put
# results of column scans on wrong pixels unless the map is square, as v_restore='released' does.
_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/runtime_det.py',
]

model = dict(
    backbone=dict(type='mmhybrid.LocalVMamba', arch='tiny', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]))
