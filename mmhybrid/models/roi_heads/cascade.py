"""The cascade head of ViTDet detectors, in mmdet's terms.

Written from a description of what detectron2 computes; from Cai and Vasconcelos, "Cascade R-CNN"
(arXiv 1712.00726), and Li et al., "Exploring Plain Vision Transformer Backbones for Object
Detection" (arXiv 2203.16527).
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.structures.bbox import bbox2roi
from torch import Tensor

from mmhybrid.registry import MODELS

from ..arguments import strict_arguments

__all__ = ['OneMaskCascadeRoIHead']


@MODELS.register_module()
@strict_arguments
class OneMaskCascadeRoIHead(CascadeRoIHead):
    """Cascade of box heads with a single mask head, as detectron2 trains and tests it.

    Differs from mmdet's ``CascadeRoIHead`` in three points:

    - One mask head.  It learns from the samples of the first stage and is applied to the final
      boxes; mmdet has one per stage and averages them.
    - The score of a box is the mean of the stages' *probabilities*; mmdet averages logits.
    - The stages' gradients into the features are divided by the number of stages, so the losses
      can have weight 1 each.

    To sample once and only relabel in the later stages, as detectron2 does, give these stages a
    ``PseudoSampler`` in ``train_cfg``.

    Args:
        num_stages: number of box heads.
        stage_loss_weights: weight of each stage's losses; detectron2's is 1 each.
        bbox_roi_extractor: config of one extractor, or one per stage.
        bbox_head: config of one box head, or one per stage.
        mask_roi_extractor: config of the mask head's extractor.
        mask_head: config of the one mask head.
        train_cfg: one per stage.
        test_cfg: thresholds and number of detections.
        init_cfg: mmengine initialisation.

    Raises:
        TypeError: for several mask heads or mask extractors.
    """

    def __init__(self, num_stages: int, stage_loss_weights: Sequence[float] = (1, 1, 1),
                 bbox_roi_extractor=None, bbox_head=None, mask_roi_extractor=None, mask_head=None,
                 train_cfg=None, test_cfg=None, init_cfg=None):
        for name, value in (('mask_head', mask_head), ('mask_roi_extractor', mask_roi_extractor)):
            if isinstance(value, (list, tuple)):
                raise TypeError(f'got {len(value)} configs for {name}, expected a single one: this '
                                "head shares one mask head between its stages; mmdet's "
                                'CascadeRoIHead has one per stage')
        super().__init__(
            num_stages=num_stages, stage_loss_weights=stage_loss_weights,
            bbox_roi_extractor=bbox_roi_extractor, bbox_head=bbox_head,
            mask_roi_extractor=mask_roi_extractor, mask_head=mask_head, train_cfg=train_cfg,
            test_cfg=test_cfg, init_cfg=init_cfg)
        self._stage_scores = None  # logits of the stages while boxes are refined

    # A single mask head is built, run and applied to the final boxes as in a Mask R-CNN.
    init_mask_head = StandardRoIHead.init_mask_head
    predict_mask = StandardRoIHead.predict_mask
    _mask_forward = StandardRoIHead._mask_forward

    def mask_loss(self, stage: int, x: tuple[Tensor, ...], sampling_results: list,
                  batch_gt_instances: list) -> dict:
        """Compute the loss of the mask head; later stages add none."""
        if stage:
            return dict(loss_mask={})
        rois = bbox2roi([result.pos_priors for result in sampling_results])
        results = self._mask_forward(x, rois)
        results.update(self.mask_head.loss_and_target(
            results['mask_preds'], sampling_results, batch_gt_instances, self.train_cfg[0]))
        return results

    def _bbox_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict:
        extractor = self.bbox_roi_extractor[stage]
        features = extractor(x[:extractor.num_inputs], rois)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient / self.num_stages)
        scores, deltas = self.bbox_head[stage](features)
        if self._stage_scores is not None:
            self._stage_scores.append(scores)
        return dict(cls_score=scores, bbox_pred=deltas, bbox_feats=features)

    def _refine_roi(self, x: tuple[Tensor, ...], rois: Tensor, batch_img_metas: list[dict],
                    num_proposals_per_img: Sequence[int]) -> tuple:
        """Refine boxes stage by stage; give scores whose softmax is the mean probability."""
        self._stage_scores = []
        try:
            rois, _, deltas = super()._refine_roi(x, rois, batch_img_metas, num_proposals_per_img)
            mean = torch.stack(self._stage_scores).softmax(dim=-1).mean(dim=0)
        finally:
            self._stage_scores = None
        scores = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return rois, scores.split(tuple(num_proposals_per_img)), deltas

    def forward(self, x: tuple[Tensor, ...], rpn_results_list: list, batch_data_samples: list
                ) -> tuple:
        """Give scores, box deltas and mask probabilities of each image, without post-processing."""
        metas = [sample.metainfo for sample in batch_data_samples]
        counts = tuple(len(result.bboxes) for result in rpn_results_list)
        rois = bbox2roi([result.bboxes for result in rpn_results_list])
        rois, scores, deltas = self._refine_roi(x, rois, metas, counts)
        masks = self._mask_forward(x, torch.cat(tuple(rois)))['mask_preds'].sigmoid()
        return scores, deltas, masks.split(counts)
