"""Mean IoU over the classes that occur, with the score of the most trivial prediction beside it.

Not imported with the package, because it needs mmseg: name it in `custom_imports`.
"""
from __future__ import annotations

import numpy as np
from mmseg.evaluation import IoUMetric

from mmhybrid.registry import METRICS

__all__ = ['PresentIoUMetric', 'majority_iou', 'present_iou']


def present_iou(intersection: np.ndarray, union: np.ndarray, truth: np.ndarray) -> float:
    """Mean IoU over the classes with at least one labelled pixel.

    Args:
        intersection: (classes,) pixels predicted correctly.
        union: (classes,) pixels predicted or labelled as the class.
        truth: (classes,) labelled pixels.

    Returns:
        Mean between 0 and 1; nan when nothing is labelled.
    """
    present = truth > 0
    return float(np.mean(intersection[present] / union[present])) if present.any() else float('nan')


def majority_iou(truth: np.ndarray) -> float:
    """The same mean for a prediction that says the most frequent class everywhere.

    Args:
        truth: (classes,) labelled pixels.

    Returns:
        Mean between 0 and 1; nan when nothing is labelled.
    """
    total, present = truth.sum(), int((truth > 0).sum())
    return float(truth.max() / total / present) if present else float('nan')


@METRICS.register_module()
class PresentIoUMetric(IoUMetric):
    """mmseg's IoU metric that also averages over the classes present in the annotations.

    mmseg's mIoU counts a class that is never annotated as 0 as soon as one pixel is predicted as
    it, so on a set with a dozen of 150 classes it can fall to a fraction for a few stray pixels.
    Adds, in percent: `mIoU_present`, `mIoU_majority` (see :func:`majority_iou`), and the number of
    `classes_present`.
    """

    def compute_metrics(self, results: list) -> dict:
        """Add the three values to those of mmseg; `results` as :meth:`process` collects them."""
        metrics = super().compute_metrics(results)
        if self.format_only:
            return metrics
        intersection, union, _, truth = (
            np.sum([np.asarray(areas, dtype=np.float64) for areas in column], axis=0)
            for column in zip(*results, strict=True))
        metrics['mIoU_present'] = round(100 * present_iou(intersection, union, truth), 2)
        metrics['mIoU_majority'] = round(100 * majority_iou(truth), 2)
        # A float, because mmengine 0.10.7 writes whole numbers as null to its metrics file.
        metrics['classes_present'] = float((truth > 0).sum())
        return metrics
