"""Binary masks to COCO polygons and run lengths, exactly.

The polygons follow pixel edges, so that pycocotools decodes them to the very mask they came from.
"""

from __future__ import annotations

import numpy as np

# Directions along pixel edges: right, down, left, up. Inside is always on the right hand.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def bounding_box(mask: np.ndarray) -> list[float]:
    """Bounding box of a non-empty mask.

    Args:
        mask: (H, W) bool.

    Returns:
        x, y, width, height in pixels.
    """
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)]


def mask_to_rle(mask: np.ndarray) -> dict:
    """Uncompressed run lengths, as COCO stores crowds.

    Args:
        mask: (H, W) bool.

    Returns:
        dict(counts=list of int, size=[H, W]): column-major runs, the first one of zeros.
    """
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if flat[0]:
        runs = [0, *runs]
    return {'counts': runs, 'size': [int(mask.shape[0]), int(mask.shape[1])]}


def _edges(mask: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Directed pixel edges between inside and outside: start corner (x, y) -> directions."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    starts: dict[tuple[int, int], list[int]] = {}

    def add(where: np.ndarray, dx: int, dy: int, direction: int) -> None:
        for y, x in np.argwhere(where).tolist():
            starts.setdefault((x + dx, y + dy), []).append(direction)

    add(inner & ~padded[:-2, 1:-1], 0, 0, 0)  # above is outside: walk right along the top edge
    add(inner & ~padded[1:-1, 2:], 1, 0, 1)
    add(inner & ~padded[2:, 1:-1], 1, 1, 2)
    add(inner & ~padded[1:-1, :-2], 0, 1, 3)
    return starts


def _loops(mask: np.ndarray) -> list[tuple[list[float], int]]:
    """Closed outlines as (x0, y0, x1, y1, ...) with their signed area; holes are negative."""
    starts = _edges(mask)
    loops = []
    while starts:
        corner = min(starts, key=lambda c: (c[1], c[0]))
        first, direction = corner, min(starts[corner])
        points: list[float] = []
        area2 = 0
        previous = -1
        while True:
            starts[corner].remove(direction)
            if not starts[corner]:
                del starts[corner]
            if direction != previous:
                points += [float(corner[0]), float(corner[1])]
            step = _STEPS[direction]
            end = (corner[0] + step[0], corner[1] + step[1])
            area2 += corner[0] * end[1] - end[0] * corner[1]
            corner, previous = end, direction
            if corner == first:
                break
            # Where two pixels touch at a corner, turning right keeps them apart (4-neighbours).
            turns = [(direction + t) % 4 for t in (1, 0, 3)]
            direction = next(t for t in turns if t in starts[corner])
        loops.append((points, area2 // 2))
    return loops


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Polygons whose union is exactly the mask.

    COCO polygons cannot have holes: a part with a hole is cut in two through the hole.

    Args:
        mask: (H, W) bool, not empty.

    Returns:
        Polygons as flat lists x0, y0, x1, y1, ... in pixel-corner coordinates.
    """
    loops = _loops(mask)
    holes = [points for points, area in loops if area < 0]
    if not holes:
        return [points for points, _ in loops]
    xs = holes[0][0::2]
    cut = int(min(xs) + max(xs) + 1) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return mask_to_polygons(left) + mask_to_polygons(right)
