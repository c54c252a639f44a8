"""Scores of single classes and confusions, taken down while mmdet and mmseg evaluate."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank, get_world_size

__all__ = ['ClassScores', 'DetectionWatcher', 'PixelWatcher', 'confusions', 'watcher_of']

SCORE, OVERLAP = 0.3, 0.5  # of a detection that counts, and with the object that it found
NOTHING, MISSED = 'background', 'missed'


@dataclass
class ClassScores:
    """Results of one validation.

    Attributes:
        heads: names of the columns of ``table``.
        table: per class its values; nan where a class does not occur.
        classes: names of the classes.
        counts: (R, C) what is against what was predicted.
        rows, columns: names of both.
        rule: how ``counts`` were counted, for people.
    """

    heads: list[str]
    table: np.ndarray
    classes: list[str]
    counts: np.ndarray
    rows: list[str]
    columns: list[str]
    rule: str


def watcher_of(metric) -> DetectionWatcher | PixelWatcher | None:
    """What takes down the results of a metric; None for metrics of other kinds."""
    names = {each.__name__ for each in type(metric).__mro__}
    if not (getattr(metric, 'dataset_meta', None) or {}).get('classes'):
        return None
    if 'CocoMetric' in names and {'bbox', 'segm'} & set(metric.metrics):
        return DetectionWatcher(metric)
    if {'IoUMetric', 'TopAccuracy'} & names and not getattr(metric, 'format_only', False):
        return PixelWatcher(metric, 'IoUMetric' in names)
    return None


# --- detectors ------------------------------------------------------------------------------------

class DetectionWatcher:
    """Takes down what a ``CocoMetric`` computes.

    Its results come from all processes and without repeated images, in the process that evaluates.
    """

    def __init__(self, metric):
        self.metric, self.scores = metric, None
        self._compute = metric.compute_metrics
        metric.compute_metrics = self._watched

    def begin(self) -> None:
        """Forget the validation before."""
        self.scores = None

    def add(self, outputs: Sequence, first: int, total: int) -> None:
        """Nothing is taken down image by image."""

    def end(self) -> ClassScores | None:
        """Give the scores, in the process that evaluates."""
        return self.scores

    def _watched(self, results: list) -> dict:
        from pycocotools.cocoeval import COCOeval
        accumulate, seen = COCOeval.accumulate, []

        def watched(evaluation, *args, **kwargs):
            accumulate(evaluation, *args, **kwargs)
            seen.append(evaluation)

        with mock.patch.object(COCOeval, 'accumulate', watched):
            metrics = self._compute(results)
        if metrics and seen:
            self.scores = self._scores(results, seen)
        return metrics

    def _scores(self, results: list, evaluations: list) -> ClassScores:
        metric, classes = self.metric, list(self.metric.dataset_meta['classes'])
        labels = {category: index for index, category in enumerate(metric.cat_ids)}
        annotations = metric._coco_api.imgToAnns
        counts = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)
        for _, result in results:
            things = [each for each in annotations.get(result['img_id'], [])
                      if each['category_id'] in labels]
            counts += confusions(things, labels, result, len(classes))
        heads, columns = ['objects'], [counts[:-1].sum(1).astype(float)]
        for each in evaluations:
            kind = dict(bbox='box', segm='mask').get(each.params.iouType, each.params.iouType)
            for name, precision in (('', each.eval['precision'][:, :, :, 0, -1]),
                                    ('50', each.eval['precision'][:1, :, :, 0, -1])):
                heads.append(f'{kind} AP{name}')
                columns.append(_mean_precision(precision))
        return ClassScores(
            heads, np.stack(columns, 1), classes, counts, [*classes, NOTHING], [*classes, MISSED],
            f'boxes with a score of at least {SCORE} and an IoU of at least {OVERLAP}')


def _mean_precision(precision: np.ndarray) -> np.ndarray:
    """AP per class of (thresholds, recalls, classes); -1 is nothing to find."""
    known = precision > -1
    counts = known.sum((0, 1))
    sums = np.where(known, precision, 0).sum((0, 1))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def confusions(things: Sequence[dict], labels: dict[int, int], result: dict, classes: int
               ) -> np.ndarray:
    """Count what the detections in one image are.

    An object and a detection belong together, whatever their classes, if no other pair of the one
    or the other overlaps more. Detections of crowds count nowhere.

    Args:
        things: annotations in COCO's form.
        labels: of their categories.
        result: 'bboxes' (N, 4) as corners, 'scores' and 'labels' (N,).
        classes: how many there are.

    Returns:
        (classes + 1, classes + 1): truth against prediction; the last row is what is nothing, the
        last column what was not found.
    """
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    sure = result['scores'] >= SCORE
    found, names = result['bboxes'][sure].reshape(-1, 4), result['labels'][sure]
    boxes = np.array([each['bbox'] for each in things], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([bool(each.get('iscrowd')) for each in things], bool)
    truth = np.array([labels[each['category_id']] for each in things], int)[~crowd]
    together = _shared(boxes[~crowd], found)
    overlap = together / np.maximum(
        _area(boxes[~crowd])[:, None] + _area(found)[None] - together, 1e-9)
    free_truth, free = np.ones(len(truth), bool), np.ones(len(found), bool)
    for place in np.argsort(-overlap, axis=None, kind='stable'):
        thing, one = np.unravel_index(place, overlap.shape)
        if overlap[thing, one] < OVERLAP:
            break
        if free_truth[thing] and free[one]:
            free_truth[thing] = free[one] = False
            counts[truth[thing], names[one]] += 1
    in_crowd = (_shared(boxes[crowd], found) >= OVERLAP * _area(found)[None]).any(0)
    np.add.at(counts, (truth[free_truth], classes), 1)
    np.add.at(counts, (classes, names[free & ~in_crowd]), 1)
    return counts


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1)


def _shared(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Area (N, M) that boxes have in common."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), 2)


# --- segmentors and classifiers -------------------------------------------------------------------

class PixelWatcher:
    """Counts, image by image, which class a pixel has and which it gets; or a whole image."""

    def __init__(self, metric, pixels: bool):
        self.metric, self.pixels = metric, pixels
        self.classes = list(metric.dataset_meta['classes'])
        self.begin()

    def begin(self) -> None:
        """Forget the validation before."""
        self.counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.long)

    def add(self, outputs: Sequence, first: int, total: int) -> None:
        """Count a batch.

        Args:
            outputs: data samples of the model.
            first: number of the first of them among those of this process.
            total: images of the data set; a sampler repeats some where processes share them.
        """
        for number, sample in enumerate(outputs):
            if (first + number) * get_world_size() + get_rank() < total:
                self._count(sample)

    def _count(self, sample) -> None:
        if not self.pixels:
            self.counts[int(sample.get('gt_label')), int(sample.get('pred_label'))] += 1
            return
        predicted = sample.pred_sem_seg.data.flatten().long()
        truth = sample.gt_sem_seg.data.flatten().to(predicted)
        count = len(self.classes)
        kept = (truth != self.metric.ignore_index) & (truth < count) & (predicted < count)
        pairs = torch.bincount(truth[kept] * count + predicted[kept], minlength=count * count)
        self.counts += pairs.reshape(count, count).cpu()

    def end(self) -> ClassScores:
        """Add up the counts of all processes, each of which has to ask."""
        if get_world_size() > 1:
            all_reduce(self.counts, 'sum')
        counts = self.counts.numpy()
        right, truth, named = np.diagonal(counts), counts.sum(1), counts.sum(0)
        share = _ratio(right, truth)
        heads, columns = (['pixels', 'IoU', 'accuracy'], [_ratio(right, truth + named - right),
                                                         share]) if self.pixels else (
            ['images', 'accuracy'], [share])
        return ClassScores(heads, np.stack([truth.astype(float), *columns], 1), self.classes,
                           counts, self.classes, self.classes,
                           'all labelled pixels' if self.pixels else 'all images')


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


