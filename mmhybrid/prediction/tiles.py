"""Large pictures in tiles that overlap, and what was found in them put together again.

Two detections of neighbouring tiles are one object if they agree in the part of the picture that
both tiles show.  An object that one tile shows whole is taken from there; one that every tile cuts
is put together from its parts.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .results import Detection, Segmentation, decoded, run_lengths

__all__ = ['Tile', 'merge_detections', 'merge_segmentations', 'tiles_of']

_AGREEMENT = 0.5  # least intersection over union, within what both tiles show
_EDGE = 2.  # pixels; an object that ends so close to the end of its tile is taken for cut


class Tile(NamedTuple):
    """A rectangle of a picture, in pixels: from ``left``, ``top`` up to ``right``, ``bottom``."""

    left: int
    top: int
    right: int
    bottom: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Its part of an image (H, W, ...)."""
        return np.ascontiguousarray(image[self.top:self.bottom, self.left:self.right])


def tiles_of(size: tuple[int, int], side: int, overlap: float) -> list[Tile]:
    """Cover a picture with tiles, evenly.

    Args:
        size: height and width of the picture.
        side: longest side of a tile.
        overlap: least part of a tile's side that its neighbour shows too, from 0 up to below 1.

    Returns:
        The tiles, row by row; one if the picture is no larger.
    """
    rows, columns = (_starts(length, side, overlap) for length in size)
    return [Tile(left, top, min(left + side, size[1]), min(top + side, size[0]))
            for top in rows for left in columns]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    step = max(1, int(side * (1 - overlap)))
    count = -(-(length - side) // step) + 1
    return [round(each) for each in np.linspace(0, length - side, count)]


# --- segmentation ---------------------------------------------------------------------------------

def merge_segmentations(parts: Sequence[Segmentation], tiles: Sequence[Tile],
                        whole: Segmentation) -> Segmentation:
    """Fill a map: each pixel is taken from the tile in whose middle it lies most.

    Args:
        parts: one for each tile.
        tiles: of :func:`tiles_of`.
        whole: what to fill; its map has the size of the picture.
    """
    columns = _owned({tile.left: tile.right for tile in tiles})
    rows = _owned({tile.top: tile.bottom for tile in tiles})
    for part, tile in zip(parts, tiles, strict=True):
        (left, right), (top, bottom) = columns[tile.left], rows[tile.top]
        whole.map[top:bottom, left:right] = part.map[
            top - tile.top:bottom - tile.top, left - tile.left:right - tile.left]
    return whole


def _owned(spans: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Divide overlaps in the middle: the start of each span -> from where to where it counts."""
    starts = sorted(spans)
    cuts = [(spans[one] + other) // 2 for one, other in itertools.pairwise(starts)]
    return dict(zip(starts, zip([starts[0], *cuts], [*cuts, spans[starts[-1]]], strict=True),
                    strict=True))


# --- detection ------------------------------------------------------------------------------------

def merge_detections(parts: Sequence[Detection], tiles: Sequence[Tile], whole: Detection
                     ) -> Detection:
    """Put together what was found in tiles.

    Args:
        parts: one for each tile, in the tile's own pixels.
        tiles: of :func:`tiles_of`.
        whole: a detection without objects that says what the picture is.

    Returns:
        The objects, the surest first.
    """
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    boxes = np.concatenate([part.boxes + np.array(tile[:2] * 2, dtype=np.float32)
                            for part, tile in zip(parts, tiles, strict=True)])
    scores, labels = (np.concatenate([getattr(part, name) for part in parts])
                      for name in ('scores', 'labels'))
    rles = [rle for part in parts for rle in part.rles or ()]
    cut = _cut(boxes, np.array(tiles)[owner], whole.size)
    groups = _groups(boxes, labels, scores, cut, owner, tiles)
    merged = [_one_of(members, boxes, cut) for members in groups]
    found = dataclasses.replace(
        whole, boxes=np.array([box for box, _ in merged], dtype=np.float32).reshape(-1, 4),
        scores=np.array([scores[takes[0]] for _, takes in merged], dtype=np.float32),
        labels=np.array([labels[takes[0]] for _, takes in merged], dtype=np.int64),
        rles=None if whole.rles is None else [
            _joined([(rles[each], tiles[owner[each]]) for each in takes], whole.size)
            for _, takes in merged])
    return found.chosen(np.argsort(-found.scores, kind='stable'))


def _cut(boxes: np.ndarray, tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which boxes end where their tile ends although the picture goes on, (N,) bool."""
    ends = np.array([0, 0, size[1], size[0]])
    return ((np.abs(boxes - tiles) <= _EDGE) & (tiles != ends)).any(axis=1)


def _groups(boxes, labels, scores, cut, owner, tiles) -> list[list[int]]:
    """Indices of the detections of each object, the surest first; one of a tile at most."""
    alike = {index: [] for index in range(len(boxes))}
    for one, other in itertools.combinations(range(len(tiles)), 2):
        first, second = np.flatnonzero(owner == one), np.flatnonzero(owner == other)
        shared = np.array([*np.maximum(tiles[one][:2], tiles[other][:2]),
                           *np.minimum(tiles[one][2:], tiles[other][2:])])
        if not (first.size and second.size and (shared[:2] < shared[2:]).all()):
            continue
        agree = _overlap(_within(boxes[first], shared), _within(boxes[second], shared))
        # A part of an object may look like something else than the whole.
        may = (labels[first][:, None] == labels[second]) | (cut[first][:, None] != cut[second])
        for a, b in np.argwhere(may & (agree >= _AGREEMENT)):
            alike[first[a]].append((agree[a, b], second[b]))
            alike[second[b]].append((agree[a, b], first[a]))
    groups, free = [], np.ones(len(boxes), dtype=bool)
    # Whole objects first, so that parts join the whole and not one another.
    for start in np.lexsort((-scores, cut)):
        if free[start]:
            groups.append(_grown(start, alike, owner, free))
    return [sorted(members, key=lambda each: -scores[each]) for members in groups]


def _grown(start: int, alike: dict, owner: np.ndarray, free: np.ndarray) -> list[int]:
    members, waiting, seen = [], [start], {owner[start]}
    free[start] = False
    while waiting:
        members.append(waiting.pop())
        for _, other in sorted(alike[members[-1]], key=lambda pair: -pair[0]):
            if free[other] and owner[other] not in seen:
                free[other] = False
                seen.add(owner[other])
                waiting.append(other)
    return members


def _within(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    return np.concatenate([np.clip(boxes[:, :2], limits[:2], limits[2:]),
                           np.clip(boxes[:, 2:], limits[:2], limits[2:])], axis=1)


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs, (N, 4) and (M, 4) to (N, M); 0 for empty boxes."""
    sides = np.clip(np.minimum(one[:, None, 2:], other[:, 2:])
                    - np.maximum(one[:, None, :2], other[:, :2]), 0, None)
    common = sides.prod(axis=2)
    areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (one, other)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-9)


def _one_of(members: list[int], boxes, cut) -> tuple[np.ndarray, list[int]]:
    """The box of an object, and which detections it is made of."""
    whole = [each for each in members if not cut[each]]
    if whole:
        return boxes[whole[0]], whole[:1]
    parts = boxes[members]
    return np.concatenate([parts[:, :2].min(axis=0), parts[:, 2:].max(axis=0)]), members


def _joined(parts: list[tuple[dict, Tile]], size: tuple[int, int]) -> dict:
    """Masks of tiles as one mask of the picture."""
    left, top = (min(tile[side] for _, tile in parts) for side in (0, 1))
    right, bottom = (max(tile[side] for _, tile in parts) for side in (2, 3))
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for rle, tile in parts:
        mask[tile.top - top:tile.bottom - top, tile.left - left:tile.right - left] |= decoded(rle)
    return _placed(mask, left, top, size)


def _placed(mask: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict:
    """Run lengths of a mask within a picture that is much larger, without making it as large."""
    rows = np.pad(mask, ((1, 1), (0, 0)))
    columns, lines = np.nonzero((rows[1:] != rows[:-1]).T)
    changes, times = np.unique((columns + left) * size[0] + lines + top, return_counts=True)
    changes = changes[times == 1]  # down to the end of one column and on at the top of the next
    end = size[0] * size[1]
    runs = np.diff(np.concatenate([[0], changes[changes < end], [end]]))
    return run_lengths().frPyObjects(dict(counts=runs.tolist(), size=list(size)), *size)
