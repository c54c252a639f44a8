# Mask R-CNN for plain backbones (ViTDet): a pyramid from the last map, two convolutions in the RPN,
# LayerNorm over channels in the heads.
# A config on top of this file states `backbone` and `neck.backbone_channel`.
_base_ = './mask_rcnn.py'

norm = dict(type='LN2d', eps=1e-6)
model = dict(
    neck=dict(_delete_=True, type='mmhybrid.SimpleFPN', out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm),
        mask_head=dict(norm_cfg=norm)))
