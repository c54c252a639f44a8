"""Accuracy of classifiers."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmengine.evaluator import BaseMetric

from ..registry import METRICS

__all__ = ['TopAccuracy']


@METRICS.register_module()
class TopAccuracy(BaseMetric):
    """Share of images, in percent, whose class is among the ``k`` with the largest scores.

    Args:
        topk: values of k; those above the number of classes are left out.
        collect_device: where several processes bring their results together, "cpu" or "gpu".
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = 'cpu'):
        super().__init__(collect_device=collect_device)
        if not topk or any(not isinstance(k, int) or k < 1 for k in topk):
            raise ValueError(f'got topk={topk!r}, expected positive integers such as (1, 5)')
        self.topk = tuple(topk)

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Count how many other classes score at least as high (or nan) as the right one."""
        for sample in data_samples:
            scores, right = sample['scores'], sample['gt_label']
            ahead = int((~(scores < scores[right])).sum()) - 1
            self.results.append((ahead, len(scores)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Give ``top1``, ``top5``, ..."""
        ahead, classes = np.asarray(results).T
        return {f'top{k}': round(100 * float(np.mean(ahead < k)), 3)
                for k in self.topk if k <= classes[0]}
