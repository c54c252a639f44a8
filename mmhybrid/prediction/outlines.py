"""Masks as polygons that a person can edit."""
from __future__ import annotations

import cv2
import numpy as np

__all__ = ['joined', 'outlines']


def outlines(mask: np.ndarray) -> list[list[list[float]]]:
    """Polygons of a mask, one for each of its connected parts.

    A part with holes is one polygon all the same: a line without width leads to each hole and
    back.  Corners are left out where the outline moves by less than a pixel.

    Args:
        mask: (H, W) bool.

    Returns:
        Polygons as lists of points [x, y], the largest part first.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    window = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].astype(np.uint8)
    # OpenCV's lines lead through the middle of pixels; four to a pixel, they are near its edge.
    fine = window.repeat(4, axis=0).repeat(4, axis=1)
    rings, tree = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    corner = np.array([columns[0], rows[0]])
    parts = []
    for place in np.flatnonzero(tree[0, :, 3] < 0):
        part = _ring(rings[place], corner)
        hole = tree[0, place, 2]
        while hole >= 0:
            part = _bridged(part, _ring(rings[hole], corner))
            hole = tree[0, hole, 0]
        parts.append((cv2.contourArea(rings[place]), part.round(2).tolist()))
    return [part for _, part in sorted(parts, key=lambda each: -each[0])]


def joined(parts: list[list[list[float]]]) -> list[list[float]]:
    """One polygon of several: lines without width lead from the first to each other one."""
    whole = np.array(parts[0])
    for part in parts[1:]:
        whole = _bridged(whole, np.array(part))
    return whole.tolist()


def _ring(points: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Points of ``findContours`` in pixels of the picture."""
    fewer = cv2.approxPolyDP(points, 3., True)
    points = fewer if len(fewer) > 2 else points
    return (points[:, 0] + 0.5) / 4 + corner


def _bridged(ring: np.ndarray, other: np.ndarray) -> np.ndarray:
    near = ((ring[:, None] - other) ** 2).sum(axis=2)
    here, there = np.unravel_index(near.argmin(), near.shape)
    turned = np.roll(other, -there, axis=0)
    return np.concatenate([ring[:here + 1], turned, turned[:1], ring[here:]])
