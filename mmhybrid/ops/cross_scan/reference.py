"""Scan orders written from their definition, one token at a time: the measure for the tables."""
from __future__ import annotations

from .orders import Direction

__all__ = ['order_reference', 'restore_reference']


def order_reference(name: str, height: int, width: int) -> list[int]:
    """Row-major token read at each position (flips applied), -1 for a zero token."""
    d = Direction.parse(name)
    order = []
    if d.kind == 'h':
        order = [r * width + c for r in range(height) for c in range(width)]
    elif d.kind == 'v':
        order = [r * width + c for c in range(width) for r in range(height)]
    else:
        for top in range(0, height, d.window):
            for left in range(0, width, d.window):
                for r in range(top, top + d.window):
                    for c in range(left, left + d.window):
                        order.append(r * width + c if r < height and c < width else -1)
    return order[::-1] if d.flip else order


def restore_reference(name: str, height: int, width: int) -> list[int]:
    """Position from which each row-major token is restored."""
    order = order_reference(name, height, width)
    return [order.index(token) for token in range(height * width)]
