# Cascade Mask R-CNN for plain backbones as detectron2's ViTDet builds it: one mask head, boxes of
# all classes in common, L1 on the deltas, samples drawn once and only relabelled in later stages.
# A config on top of this file states `backbone` and `neck.backbone_channel`.
#
# What stays mmdet's: boxes that come from ground truth leave after the first stage, and the loss of
# the RPN is divided by the anchors sampled, not by 256 (equal unless fewer were found).
_base_ = './cascade_mask_rcnn.py'

norm = dict(type='LN2d', eps=1e-6)
model = dict(
    neck=dict(_delete_=True, type='mmhybrid.SimpleFPN', out_channels=256, num_outs=5),
    rpn_head=dict(
        num_convs=2, loss_bbox=dict(_delete_=True, type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='mmhybrid.OneMaskCascadeRoIHead',
        stage_loss_weights=[1, 1, 1],
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0] * 4,
                    target_stds=[1 / centre, 1 / centre, 1 / side, 1 / side]),
                reg_class_agnostic=True,
                norm_cfg=norm,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0))
            for centre, side in ((10, 5), (20, 10), (30, 15))
        ],
        mask_head=dict(norm_cfg=norm)),
    train_cfg=dict(
        rpn=dict(allowed_border=-1),
        rpn_proposal=dict(max_per_img=1000),
        rcnn=[
            _base_.model.train_cfg.rcnn[0],
            *(dict(stage, sampler=dict(type='PseudoSampler'))
              for stage in _base_.model.train_cfg.rcnn[1:]),
        ]))
