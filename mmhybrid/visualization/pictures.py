"""Draw instances and label maps over images, with numpy and Pillow.

Small images are enlarged first, so that labels stay readable.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['draw_instances', 'draw_regions', 'side_by_side']

# Far apart in hue and brightness; consecutive instances take consecutive colours.
_COLORS = ((230, 60, 60), (60, 140, 240), (60, 190, 75), (245, 160, 40), (170, 80, 220),
           (40, 200, 210), (240, 90, 190), (190, 200, 40), (150, 100, 60), (120, 130, 250))
_LONG_SIDE = 480
_FONT_SIZE = 14
_PAD = 3
_MARGIN = 8


def _font() -> ImageFont.ImageFont:
    """Matplotlib's font, which mmengine brings along: Pillow's own lacks letters beyond ASCII."""
    try:
        from matplotlib import get_data_path
        return ImageFont.truetype(Path(get_data_path(), 'fonts/ttf/DejaVuSans.ttf'), _FONT_SIZE)
    except (ImportError, OSError):
        return ImageFont.load_default(size=_FONT_SIZE)


def _enlarge(image: np.ndarray) -> tuple[Image.Image, int]:
    """Return the image, a whole number of times larger if it is small, and that number."""
    factor = max(1, _LONG_SIDE // max(image.shape[:2]))
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width * factor, height * factor), Image.BICUBIC), factor


def _enlarge_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: tuple[int, ...],
          size: tuple[int, int]) -> None:
    """Write `text` on a filled box with its lower left corner at x, y, moved inside `size`."""
    font = _font()
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * _PAD, bottom - top + 2 * _PAD
    x = min(max(0, x), max(0, size[0] - width))
    y = min(max(0, y - height), max(0, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
    draw.text((x + _PAD - left, y + _PAD - top), text, fill=ink, font=font)


def draw_instances(image: np.ndarray, boxes: np.ndarray, labels: Sequence[str],
                   masks: np.ndarray | None = None,
                   scores: Sequence[float] | None = None) -> Image.Image:
    """Draw boxes, masks and labels.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the image.
        labels: N names.
        masks: (N, H, W) bool, or None.
        scores: N numbers between 0 and 1, or None.

    Returns:
        The picture, enlarged when the image is small.
    """
    picture, factor = _enlarge(image)
    pixels = np.asarray(picture).astype(np.float32)
    for number, mask in enumerate(masks if masks is not None else ()):
        color = np.array(_COLORS[number % len(_COLORS)], dtype=np.float32)
        inside = _enlarge_mask(np.asarray(mask, dtype=bool), factor)
        core = inside.copy()  # the inside without its outermost two pixels
        for _ in range(2):
            core[1:-1, 1:-1] &= (core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2]
                                 & core[1:-1, 2:])
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * color
        pixels[inside & ~core] = color
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for number, box in enumerate(boxes):
        draw.rectangle([float(side) * factor for side in box],
                       outline=_COLORS[number % len(_COLORS)], width=2)
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        text = label if scores is None else f'{label} {scores[number]:.2f}'
        _text(draw, float(box[0]) * factor, float(box[1]) * factor, text,
              _COLORS[number % len(_COLORS)], picture.size)
    return picture


def draw_regions(image: np.ndarray, labels: np.ndarray, names: Sequence[str],
                 palette: Sequence[Sequence[int]], ignore: int = 255) -> Image.Image:
    """Draw a label map as colours over the image, each class named where it is largest.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers, indices into `names`, or `ignore`.
        names: One name per class.
        palette: One RGB colour per class.
        ignore: The label that stays uncoloured.

    Returns:
        The picture, enlarged when the image is small.
    """
    picture, factor = _enlarge(image)
    pixels = np.asarray(picture).astype(np.float32)
    present = [int(label) for label in np.unique(labels) if label != ignore]
    for label in present:
        inside = _enlarge_mask(labels == label, factor)
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * np.array(palette[label], dtype=np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for label in present:
        # A row where the class is widest, in the middle of its longest run there.
        inside = labels == label
        row = int(inside.sum(axis=1).argmax())
        columns = np.flatnonzero(inside[row])
        run = max(np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1), key=len)
        width = draw.textlength(names[label], font=_font())
        _text(draw, (run[0] + run[-1] + 1) / 2 * factor - width / 2,
              row * factor + _FONT_SIZE, names[label].strip(), tuple(palette[label]), picture.size)
    return picture


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put titled pictures of equal height next to each other.

    Args:
        panels: Titles and pictures, left to right.

    Returns:
        One picture on white.
    """
    top = _FONT_SIZE + 2 * _MARGIN
    width = sum(picture.width for _, picture in panels) + _MARGIN * (len(panels) + 1)
    height = max(picture.height for _, picture in panels) + top + _MARGIN
    sheet = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(sheet)
    x = _MARGIN
    for title, picture in panels:
        draw.text((x, _MARGIN), title, fill='black', font=_font())
        sheet.paste(picture, (x, top))
        x += picture.width + _MARGIN
    return sheet
