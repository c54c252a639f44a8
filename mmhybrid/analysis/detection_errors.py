"""What kinds of mistakes a detector makes, and what each kind costs.

After Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection
Errors" (ECCV 2020, arXiv 2008.08115), section 2, for boxes.

Legend: N boxes that were found in an image, M objects that are there.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ['KINDS', 'DetectionErrors', 'Found', 'Mistake', 'Objects', 'box_overlaps',
           'detection_errors']

#: The kinds of mistakes, and what each means.
KINDS = {
    'classification': 'right place, wrong class',
    'localisation': 'right class, wrong place',
    'both': 'near an object of another class',
    'duplicate': 'an object that was found already',
    'background': 'nothing is there',
    'missed': 'an object that no box is near',
}
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Objects:
    """What is in an image.

    Attributes:
        boxes: (M, 4) left, top, right, bottom.
        labels: (M,) integers.
        crowd: (M,) bool; a box over many objects, in which boxes of its class are no mistakes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class Found:
    """What a detector found in an image.

    Attributes:
        boxes: (N, 4) left, top, right, bottom.
        labels: (N,) integers.
        scores: (N,).
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        kind: of :data:`KINDS`.
        image: its index.
        found: index of the box, None for a missed object.
        object: index of the object that it is about, None for a box on the background.
        overlap: intersection over union of the two, 0 without a pair.
        score: of the box, 0 for a missed object.
    """

    kind: str
    image: int
    found: int | None
    object: int | None
    overlap: float
    score: float


@dataclass(frozen=True)
class DetectionErrors:
    """All mistakes on a set of images, and what they cost.

    Attributes:
        ap: average precision at the overlap that counts as found (AP50 of COCO), 0 to 1.
        cost: for each kind by how much ``ap`` grows if its mistakes, and no others, are put right.
            'false positives' and 'false negatives' are all of these.
        mistakes: image by image, those of boxes from the surest to the least sure.
    """

    ap: float
    cost: dict[str, float]
    mistakes: list[Mistake]

    def of_kind(self, kind: str) -> list[Mistake]:
        """The mistakes of one kind, the surest first."""
        return sorted((each for each in self.mistakes if each.kind == kind),
                      key=lambda each: -each.score)


def detection_errors(images: Iterable[tuple[Objects, Found]], foreground: float = 0.5,
                     background: float = 0.1) -> DetectionErrors:
    """Sort the mistakes of a detector by their kind.

    Boxes are matched as COCO does it: the surest first, each with the free object of its class that
    it overlaps most, by ``foreground`` or more.  What stays without a partner is a mistake, of the
    first kind that fits, in this order:

    - localisation: overlaps an object of its class by ``background`` or more, but less than
      ``foreground``;
    - classification: overlaps an object of another class by ``foreground`` or more;
    - duplicate: overlaps an object of its class by ``foreground`` or more, which is taken;
    - both: overlaps an object of another class by ``background`` or more;
    - background: everything else.

    Objects without a partner that no classification or localisation mistake is about are missed.

    To put right means: the box of a classification or localisation mistake becomes the partner of
    its object, or goes if that has one or a surer mistake is about it; other boxes go; missed
    objects no longer count.  Classes without objects do not count; without any object the average
    precision is 0.

    Args:
        images: objects and findings of each image.
        foreground: overlap from which a box has found an object.
        background: overlap below which a box has nothing to do with an object.
    """
    mistakes, points, counts, free = [], [], {}, {}
    for image, (objects, found) in enumerate(images):
        overlaps = box_overlaps(found.boxes, objects.boxes)
        partners = _partners(overlaps, objects, found, foreground)
        ignored = _in_crowds(objects, found, foreground) & (partners < 0)
        here = {int(box): _judged(image, box, overlaps[box], objects, found, foreground, background)
                for box in _surest_first(found) if partners[box] < 0 and not ignored[box]}
        points += [_Point(int(found.labels[box]), float(found.scores[box]), partners[box] >= 0,
                          here.get(int(box))) for box in _surest_first(found) if not ignored[box]]
        near = {each.object for each in here.values()
                if each.kind in ('classification', 'localisation')}
        mistakes += here.values()
        for place in np.flatnonzero(~objects.crowd):
            label = int(objects.labels[place])
            counts[label] = counts.get(label, 0) + 1
            if place not in partners:
                free[image, int(place)] = label
                if place not in near:
                    mistakes.append(Mistake('missed', image, None, int(place), 0., 0.))
    return _costed(mistakes, points, counts, free)


@dataclass(frozen=True)
class _Point:
    """A box as average precision sees it."""

    label: int
    score: float
    hit: bool
    mistake: Mistake | None


def _surest_first(found: Found) -> np.ndarray:
    return np.argsort(-found.scores, kind='stable')


def _partners(overlaps: np.ndarray, objects: Objects, found: Found, foreground: float
              ) -> np.ndarray:
    """(N,) index of the object that each box has found, -1 for none."""
    partners = np.full(len(found.labels), -1)
    free = ~objects.crowd
    for each in _surest_first(found):
        fits = free & (objects.labels == found.labels[each]) & (overlaps[each] >= foreground)
        if fits.any():
            partners[each] = np.where(fits, overlaps[each], -1).argmax()
            free[partners[each]] = False
    return partners


def _in_crowds(objects: Objects, found: Found, foreground: float) -> np.ndarray:
    """(N,) whether a box lies, with so much of itself, in a crowd of its class."""
    inside = box_overlaps(found.boxes, objects.boxes, of_first=True) >= foreground
    same = found.labels[:, None] == objects.labels
    return (inside & same & objects.crowd).any(axis=1)


def _judged(image: int, box: int, overlaps: np.ndarray, objects: Objects, found: Found,
            foreground: float, background: float) -> Mistake:
    same = (objects.labels == found.labels[box]) & ~objects.crowd
    others = ~same & ~objects.crowd
    near, other = (np.where(which, overlaps, -1) if which.any() else np.array([-1.])
                   for which in (same, others))
    if background <= near.max() < foreground:
        kind, of = 'localisation', near
    elif other.max() >= foreground:
        kind, of = 'classification', other
    elif near.max() >= foreground:
        kind, of = 'duplicate', near
    elif other.max() >= background:
        kind, of = 'both', other
    else:
        return Mistake('background', image, int(box), None, 0., float(found.scores[box]))
    return Mistake(kind, image, int(box), int(of.argmax()), float(of.max()),
                   float(found.scores[box]))


def _costed(mistakes: list[Mistake], points: list[_Point], counts: dict[int, int],
            free: dict[tuple[int, int], int]) -> DetectionErrors:
    """Put each kind right, and see what it changes.

    Args:
        mistakes: all of them.
        points: boxes that count.
        counts: objects of each class.
        free: class of each object, by image and index, that no box has found.
    """
    ap = _mean_precision(points, counts)
    found, remaining = dict.fromkeys(counts, 0), dict(counts)
    for each in points:
        if each.hit:
            found[each.label] += 1
    for each in mistakes:
        if each.kind == 'missed':
            remaining[free[each.image, each.object]] -= 1
    # where all objects go, all that are left are found
    of_none = float(bool(counts))
    right = dict(
        classification=_mean_precision(_moved(points, 'classification', free), counts),
        localisation=_mean_precision(_moved(points, 'localisation', free), counts),
        both=_mean_precision(_without(points, 'both'), counts),
        duplicate=_mean_precision(_without(points, 'duplicate'), counts),
        background=_mean_precision(_without(points, 'background'), counts),
        missed=_mean_precision(points, remaining, of_none))
    right['false positives'] = _mean_precision(_without(points, *KINDS), counts)
    right['false negatives'] = _mean_precision(points, found, of_none)
    return DetectionErrors(ap, {kind: value - ap for kind, value in right.items()}, mistakes)


def _moved(points: list[_Point], kind: str, free: dict[tuple[int, int], int]) -> list[_Point]:
    """Let boxes of a kind of mistake find the objects that they are about.

    Of all boxes that are about an object the surest one decides, so that an object is not found
    once for each kind.
    """
    best: dict[tuple[int, int], _Point] = {}
    for each in points:
        if each.mistake is not None and each.mistake.kind in ('classification', 'localisation'):
            place = each.mistake.image, each.mistake.object
            if place in free and (place not in best or each.score > best[place].score):
                best[place] = each
    return _without(points, kind) + [
        _Point(free[place], each.score, True, None) for place, each in best.items()
        if each.mistake.kind == kind]


def _without(points: list[_Point], *kinds: str) -> list[_Point]:
    return [each for each in points if each.mistake is None or each.mistake.kind not in kinds]


def _mean_precision(points: Iterable[_Point], counts: dict[int, int], of_none: float = 0.
                    ) -> float:
    """Mean over classes of the average precision at 101 recalls."""
    of_class: dict[int, list[_Point]] = {}
    for each in points:
        of_class.setdefault(each.label, []).append(each)
    values = [_average_precision(of_class.get(label, []), count)
              for label, count in counts.items() if count]
    return float(np.mean(values)) if values else of_none


def _average_precision(points: Sequence[_Point], count: int) -> float:
    order = np.argsort([-each.score for each in points], kind='stable')
    hits = np.array([each.hit for each in points], dtype=bool)[order].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / count, _RECALLS, side='left')
    return float(np.append(precision, 0.)[places].mean())


def box_overlaps(first: np.ndarray, second: np.ndarray, of_first: bool = False) -> np.ndarray:
    """Intersections over unions, or over the first boxes.

    Args:
        first: (N, 4) left, top, right, bottom.
        second: (M, 4).
        of_first: set the intersection beside the area of the first box alone.

    Returns:
        (N, M) float64; 0 for boxes without an area.
    """
    first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
                     for boxes in (first, second))
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas, others = (np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
                     for boxes in (first, second))
    whole = areas[:, None] + (0 if of_first else others[None] - shared)
    whole = np.broadcast_to(whole, shared.shape)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
