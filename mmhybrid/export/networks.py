"""What of a model goes into a file, as modules from an image to tensors.

Legend: B images, K classes, M objects of an image at most, H W sides of the input.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .boxes import nms, roi_align

__all__ = ['Features', 'Segmentor', 'TwoStageDetector', 'part_of']


class Features(nn.Module):
    """Backbone, and neck if there is one: the maps."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None):
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to maps."""
        maps = self.backbone(image)
        return tuple(maps if self.neck is None else self.neck(maps))


class Segmentor(nn.Module):
    """An encoder and decoder of mmseg: logits of the input's size, and the likeliest class."""

    outputs = ('logits', 'labels')

    def __init__(self, model: nn.Module):
        super().__init__()
        if model.test_cfg.get('mode') != 'whole':
            raise UserError("test_cfg.mode is 'slide'; export writes what takes a picture whole. "
                            "Set --cfg-options model.test_cfg.mode=whole.")
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to (B, K, H, W) and (B, H, W) int64."""
        logits = self.model.decode_head(self.model.extract_feat(image))
        logits = F.interpolate(logits, image.shape[-2:], mode='bilinear',
                               align_corners=self.model.align_corners)
        return logits, logits.argmax(1)


class TwoStageDetector(nn.Module):
    """Mask R-CNN, Cascade Mask R-CNN, and both without masks.

    What mmdet does with a picture, with sizes that do not depend on values: where there are fewer
    than M objects, the scores are 0 and the labels -1.

    Args:
        model: of mmdet.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        head = model.roi_head
        self.with_mask = head.with_mask
        self.cascade = isinstance(head.bbox_head, nn.ModuleList)
        self.box_heads = list(head.bbox_head) if self.cascade else [head.bbox_head]
        self.extractors = _listed(head.bbox_roi_extractor)
        self.mask_heads = _listed(head.mask_head) if self.with_mask else []
        self.mask_extractors = _listed(head.mask_roi_extractor) if self.with_mask else []
        self.mean_of_probabilities = type(head).__name__ == 'OneMaskCascadeRoIHead'
        self.outputs = ('boxes', 'scores', 'labels', *(['masks'] if self.with_mask else []))

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Find objects.

        Args:
            image: (B, 3, H, W).
            size: (B, 2) float32, height and width of the pictures in it, without their padding.

        Returns:
            Boxes (B, M, 4) in pixels of the input, scores (B, M), labels (B, M) int64, and
            probabilities of masks (B, M, h, w) over the boxes.
        """
        maps = tuple(self.model.extract_feat(image))
        proposals = self._proposals(maps, size)
        found = [self._image(maps, boxes, real, number, size[number])
                 for number, (boxes, real) in enumerate(proposals)]
        return tuple(torch.stack(each) for each in zip(*found, strict=True))

    def _proposals(self, maps: Sequence[Tensor], size: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Boxes (P, 4) and whether they are any (P,), of each image."""
        head, cfg = self.model.rpn_head, self.model.test_cfg.rpn
        scores, deltas = head(maps)
        anchors = head.prior_generator.grid_priors(
            [tuple(x.shape[-2:]) for x in scores], scores[0].dtype, scores[0].device)
        found = []
        for number in range(size.shape[0]):
            boxes, of_boxes = [], []
            for score, delta, anchor in zip(scores, deltas, anchors, strict=True):
                score = score[number].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
                score = (score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1))[:, 0]
                delta = delta[number].permute(1, 2, 0).reshape(-1, 4)
                score, index = score.topk(min(cfg.nms_pre, score.shape[0]))
                box = _decoded(head.bbox_coder, anchor[index], delta[index], size[number])
                small = (box[:, 2:] - box[:, :2]).amin(1) <= cfg.get('min_bbox_size', 0)
                score = torch.where(small, -torch.ones_like(score), score)
                _, kept = nms(box[None], score[None], cfg.nms.iou_threshold, -0.5,
                              min(cfg.max_per_img, score.shape[0]))
                boxes.append(box[kept.clamp_min(0)])
                of_boxes.append(torch.where(kept >= 0, score[kept.clamp_min(0)], -1.))
            boxes, of_boxes = torch.cat(boxes), torch.cat(of_boxes)
            best, index = of_boxes.topk(min(cfg.max_per_img, of_boxes.shape[0]))
            found.append((boxes[index], best >= 0))
        return found

    def _image(self, maps, boxes: Tensor, real: Tensor, number: int, size: Tensor
               ) -> tuple[Tensor, ...]:
        cfg, logits, deltas = self.model.test_cfg.rcnn, [], None
        last = len(self.box_heads) - 1
        for stage, head in enumerate(self.box_heads):
            extractor = self.extractors[stage if self.cascade else 0]
            scores, deltas = head(_pooled(extractor, maps, boxes, number))
            logits.append(scores)
            if stage < last:
                choice = deltas.unflatten(1, (-1, 4))
                if not head.reg_class_agnostic:
                    label = scores[:, :-1].argmax(1)
                    choice = choice.gather(1, label[:, None, None].expand(-1, 1, 4))
                boxes = _decoded(head.bbox_coder, boxes, choice[:, 0], size)
        head, logits = self.box_heads[-1], torch.stack(logits)
        scores = (logits.softmax(-1).mean(0) if self.mean_of_probabilities
                  else logits.mean(0).softmax(-1))[:, :-1]
        scores = torch.where(real[:, None], scores, 0.)
        deltas = deltas.unflatten(1, (-1, 4))
        boxes = _decoded(head.bbox_coder, boxes[:, None].expand_as(deltas).flatten(0, 1),
                         deltas.flatten(0, 1), size)
        boxes = boxes.unflatten(0, (-1, deltas.shape[1])).transpose(0, 1)
        classes = scores.shape[1]
        boxes = boxes.expand(classes, -1, -1)
        labels, index = nms(boxes, scores.T, cfg.nms.iou_threshold, cfg.score_thr, cfg.max_per_img)
        there = labels >= 0
        place = labels.clamp_min(0), index.clamp_min(0)
        boxes = torch.where(there[:, None], boxes[place], 0.)
        found = boxes, torch.where(there, scores.T[place], 0.), labels
        return (*found, self._masks(maps, boxes, labels, number)) if self.with_mask else found

    def _masks(self, maps, boxes: Tensor, labels: Tensor, number: int) -> Tensor:
        found = []
        for head, extractor in zip(self.mask_heads, self.mask_extractors, strict=True):
            masks = head(_pooled(extractor, maps, boxes, number)).sigmoid()
            label = torch.zeros_like(labels) if head.class_agnostic else labels.clamp_min(0)
            found.append(masks[torch.arange(len(label)), label])
        return torch.stack(found).mean(0)


def _listed(parts) -> list[nn.Module]:
    return list(parts) if isinstance(parts, nn.ModuleList) else [parts]


def _decoded(coder, boxes: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """Boxes (N, 4) moved by deltas (N, 4), inside of a picture of ``size`` (2,)."""
    boxes = coder.decode(boxes, deltas, max_shape=None)
    height, width = size.unbind()
    limit = torch.stack([width, height, width, height])
    return torch.minimum(boxes.clamp_min(0), limit)


def _pooled(extractor, maps, boxes: Tensor, number: int) -> Tensor:
    """Regions (R, channels, size, size) of one image."""
    maps, layers = maps[:extractor.num_inputs], extractor.roi_layers
    rois = torch.cat([torch.full_like(boxes[:, :1], number), boxes], 1)
    levels = extractor.map_roi_levels(rois, len(maps))
    first = layers[0]
    return roi_align(maps, rois, levels, first.output_size[0],
                     [layer.spatial_scale for layer in layers], first.sampling_ratio,
                     first.aligned)


def part_of(model: nn.Module, part: str) -> nn.Module:
    """What of a model is written.

    Args:
        model: of mmdet or mmseg, or a backbone alone.
        part: 'whole', 'neck' (backbone and neck) or 'backbone'.

    Raises:
        UserError: for a model that has no such part, or whose heads are not known.
    """
    kind = type(model).__name__
    backbone, neck = getattr(model, 'backbone', model), getattr(model, 'neck', None)
    if part == 'backbone':
        return Features(backbone)
    if part == 'neck':
        if neck is None:
            raise UserError(f'--part neck: the model, a {kind}, has no neck. Take --part '
                            'backbone.')
        return Features(backbone, neck)
    if kind == 'EncoderDecoder':
        return Segmentor(model)
    if kind in ('MaskRCNN', 'CascadeRCNN', 'FasterRCNN'):
        _check_heads(model)
        return TwoStageDetector(model)
    raise UserError(f'Export knows the heads of UPerNet-like segmentors (EncoderDecoder), Mask '
                    f'R-CNN and Cascade (Mask) R-CNN, and the model is a {kind}. Its features can '
                    'be written: --part backbone, or --part neck.')


def _check_heads(model: nn.Module) -> None:
    head = model.roi_head
    for extractor in _listed(head.bbox_roi_extractor):
        layers = getattr(extractor, 'roi_layers', ())
        if type(extractor).__name__ != 'SingleRoIExtractor' or any(
                type(layer).__name__ != 'RoIAlign' for layer in layers):
            raise UserError('Export knows SingleRoIExtractor with RoIAlign, and the model has '
                            f'{type(extractor).__name__}. Its features can be written: --part '
                            'neck.')
    for name, cfg in (('rpn', model.test_cfg.rpn), ('rcnn', model.test_cfg.rcnn)):
        if cfg.nms.get('type', 'nms') != 'nms':
            raise UserError(f'model.test_cfg.{name}.nms.type is {cfg.nms.type!r}, and ONNX has an '
                            "operator for plain suppression alone; set it to 'nms'.")
