"""Pictures of what networks compute: heat over an image, channels of a map as colours."""
from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .pictures import _enlarge, _stroke

__all__ = ['as_colors', 'draw_heat', 'draw_map', 'mark']

_MARK = (90, 230, 255)


def draw_heat(image: np.ndarray, heat: np.ndarray, most: float | None = None,
              enlarge: bool = True) -> Image.Image:
    """Lay heat over a grey image: cold places stay grey, the hottest become bright yellow.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: (H, W) numbers, no less than 0.
        most: what is the hottest; None for the largest number.
        enlarge: make a small image larger.

    Returns:
        The picture; all grey if there is no heat.
    """
    most = heat.max() if most is None else most
    heat = np.clip(heat / (most or 1), 0, 1)
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    share = 0.8 * heat[..., None] ** 0.5
    mixed = (1 - share) * grey + share * _colors(heat)
    return _enlarge(mixed.round().astype(np.uint8), enlarge)[0]


def draw_map(values: np.ndarray, side: int) -> Image.Image:
    """Draw a map as it is, each of its cells a square.

    Args:
        values: (h, w) numbers, of which the smallest becomes black and the largest yellow; or
            (h, w, 3) uint8 colours.
        side: of the picture in pixels, along the longer side of the map.
    """
    if values.ndim == 2:
        spread = values.max() - values.min()
        values = _colors((values - values.min()) / (spread or 1)).round().astype(np.uint8)
    height, width = values.shape[:2]
    scale = side / max(height, width)
    return Image.fromarray(values).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.NEAREST)


def _colors(values: np.ndarray) -> np.ndarray:
    """(...) from 0 to 1 to (..., 3) float32 up to 255."""
    from matplotlib import colormaps

    return 255 * colormaps['inferno'](np.clip(values, 0, 1))[..., :3].astype(np.float32)


def as_colors(channels: np.ndarray) -> np.ndarray:
    """Show where channels of a map agree: their three principal components as red, green and blue.

    Args:
        channels: (C, h, w).

    Returns:
        (h, w, 3) uint8; grey where a component does not vary.
    """
    count, height, width = channels.shape
    points = channels.reshape(count, -1).astype(np.float64)
    points -= points.mean(axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(points @ points.T)
    vectors = vectors[:, ::-1][:, :3]
    # a vector and its negative are as good; the larger side decides, so that pictures repeat
    strongest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    parts = (vectors * np.sign(strongest)).T @ points
    low, high = (np.percentile(parts, share, axis=1, keepdims=True) for share in (1, 99))
    varied = high - low > 1e-9 * max(1., np.abs(channels).max())
    scaled = np.where(varied, (parts - low) / np.where(varied, high - low, 1), 0.5)
    colors = np.full((3, height * width), 127.5)
    colors[:len(scaled)] = 255 * np.clip(scaled, 0, 1)
    return colors.T.reshape(height, width, 3).round().astype(np.uint8)


def mark(picture: Image.Image, x: float, y: float) -> Image.Image:
    """Draw a ring around a point of a picture, given in its pixels; changes and returns it."""
    stroke = _stroke(picture)
    radius = max(5, min(picture.size) // 60) * stroke
    draw = ImageDraw.Draw(picture)
    for color, more in (((0, 0, 0), 2), (_MARK, 0)):
        size = radius + more * stroke / 2
        draw.ellipse((x - size, y - size, x + size, y + size), outline=color,
                     width=(2 + more) * stroke)
    return picture

