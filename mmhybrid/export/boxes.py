"""Suppression of boxes and pooling of regions with sizes that do not depend on values.

As operators, which ``mmhybrid.export.operators`` writes as ``NonMaxSuppression`` and ``RoiAlign``.
A file then gives the same number of rows for every picture: what is missing is -1.

Legend: C classes, N boxes, M rows of a result, R regions.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ['nms', 'roi_align']

_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_library.define('export_nms(Tensor boxes, Tensor scores, float iou_threshold, '
                'float score_threshold, int most) -> (Tensor, Tensor)')
_library.define('export_roi_align(Tensor[] maps, Tensor rois, Tensor levels, int size, '
                'float[] scales, int samples, bool aligned) -> Tensor')


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int
        ) -> tuple[Tensor, Tensor]:
    """The best boxes of all classes, each class suppressed for itself.

    Args:
        boxes: (C, N, 4) corners.
        scores: (C, N).
        iou_threshold: a box goes when it overlaps a better one by more.
        score_threshold: boxes need a higher score.
        most: M, also of each class.

    Returns:
        Classes and indices of boxes, (M,) int64, the best first; -1 where there are fewer.
    """
    return torch.ops.mmhybrid.export_nms(boxes, scores, iou_threshold, score_threshold, most)


def roi_align(maps: Sequence[Tensor], rois: Tensor, levels: Tensor, size: int,
              scales: Sequence[float], samples: int, aligned: bool) -> Tensor:
    """Regions of a pyramid, each from its own level.

    Args:
        maps: (B, channels, h, w) each.
        rois: (R, 5) image and corners in pixels of the input.
        levels: (R,) int64.
        size: bins along a side.
        scales: pixels of a map per pixel of the input.
        samples: of a bin along an axis; 0 chooses ceil(region / bins).
        aligned: shift by half a pixel.

    Returns:
        (R, channels, size, size).
    """
    return torch.ops.mmhybrid.export_roi_align(list(maps), rois, levels, size, list(scales),
                                               samples, aligned)


@torch.library.impl(_library, 'export_nms', 'CompositeExplicitAutograd')
def _nms(boxes, scores, iou_threshold, score_threshold, most):
    from torchvision.ops import nms

    found = []
    for number, (of_class, score) in enumerate(zip(boxes, scores, strict=True)):
        above = (score > score_threshold).nonzero()[:, 0]
        kept = above[nms(of_class[above], score[above], iou_threshold)][:most]
        found.append(torch.stack([torch.full_like(kept, number), kept]))
    classes, index = torch.cat(found, 1)
    order = scores[classes, index].sort(descending=True, stable=True)[1][:most]
    missing = most - len(order)
    return tuple(torch.nn.functional.pad(x[order], (0, missing), value=-1)
                 for x in (classes, index))


@torch.library.register_fake('mmhybrid::export_nms', lib=_library)
def _nms_fake(boxes, scores, iou_threshold, score_threshold, most):
    return tuple(boxes.new_empty((most,), dtype=torch.int64) for _ in range(2))


@torch.library.impl(_library, 'export_roi_align', 'CompositeExplicitAutograd')
def _roi_align(maps, rois, levels, size, scales, samples, aligned):
    from torchvision.ops import roi_align

    pooled = rois.new_empty((len(rois), maps[0].shape[1], size, size))
    for level, (x, scale) in enumerate(zip(maps, scales, strict=True)):
        mine = levels == level
        pooled[mine] = roi_align(x, rois[mine], size, scale, samples, aligned)
    return pooled


@torch.library.register_fake('mmhybrid::export_roi_align', lib=_library)
def _roi_align_fake(maps, rois, levels, size, *_):
    return maps[0].new_empty((rois.shape[0], maps[0].shape[1], size, size))
