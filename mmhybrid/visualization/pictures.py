"""Draw instances and label maps over images, with numpy and Pillow.

Small images are enlarged first, so that labels stay readable.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['class_colors', 'draw_instances', 'draw_regions', 'sheet', 'side_by_side']

# Far apart in hue and brightness; consecutive instances take consecutive colours.
_COLORS = ((230, 60, 60), (60, 140, 240), (60, 190, 75), (245, 160, 40), (170, 80, 220),
           (40, 200, 210), (240, 90, 190), (190, 200, 40), (150, 100, 60), (120, 130, 250))
_LONG_SIDE = 480
_LARGE_SIDE = 1400
_ROWS = 512  # coloured at once: numbers with fractions take four times the memory
_FONT_SIZE = 14
_PAD = 3
_MARGIN = 8
_NOTHING = Image.new('RGB', (1, 1))


def class_colors(count: int) -> list[tuple[int, int, int]]:
    """Colours (red, green, blue) for classes, those of the first ones furthest apart."""
    hues = ((0.61803 * number) % 1 for number in range(count - len(_COLORS)))
    values = (hsv_to_rgb(hue, 0.55 + 0.4 * (number % 2), 0.95 - 0.3 * (number % 3 == 2))
              for number, hue in enumerate(hues))
    return [*_COLORS[:count], *(tuple(round(255 * part) for part in value) for value in values)]


@functools.cache
def _font(size: int = _FONT_SIZE) -> ImageFont.ImageFont:
    """Matplotlib's font, which mmengine brings along: Pillow's own lacks letters beyond ASCII."""
    try:
        from matplotlib import get_data_path
        return ImageFont.truetype(Path(get_data_path(), 'fonts/ttf/DejaVuSans.ttf'), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size=size)


def _enlarge(image: np.ndarray, wanted: bool) -> tuple[Image.Image, int]:
    """Return the image, a whole number of times larger if it is small, and that number."""
    factor = max(1, _LONG_SIDE // max(image.shape[:2])) if wanted else 1
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((width * factor, height * factor), Image.BICUBIC), factor


def _enlarge_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    return mask.repeat(factor, axis=0).repeat(factor, axis=1)


def _stroke(picture: Image.Image) -> int:
    """How many times thicker lines and letters are in a large picture, which is seen smaller."""
    return max(1, round(max(picture.size) / _LARGE_SIDE))


class _Labels:
    """Writes labels, each on a filled box, and keeps them apart where there is room."""

    def __init__(self, picture: Image.Image, stroke: int):
        self.draw, self.size = ImageDraw.Draw(picture), picture.size
        self.font, self.pad = _font(_FONT_SIZE * stroke), _PAD * stroke
        self.taken: list[tuple[float, float, float, float]] = []

    def __call__(self, x: float, bottoms: Sequence[float], text: str, color: tuple[int, ...]
                 ) -> None:
        """Write `text` with its left side at x and its lower side at the first free height."""
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
        width, height = right - left + 2 * self.pad, bottom - top + 2 * self.pad
        x = min(max(0, x), max(0, self.size[0] - width))
        places = [(x, y, x + width, y + height) for y in (
            min(max(0, each - height), max(0, self.size[1] - height)) for each in bottoms)]
        place = next((each for each in places if not any(
            each[0] < other[2] and other[0] < each[2] and each[1] < other[3] and other[1] < each[3]
            for other in self.taken)), places[0])
        self.taken.append(place)
        self.draw.rectangle(place, fill=color)
        ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
        self.draw.text((place[0] + self.pad - left, place[1] + self.pad - top), text, fill=ink,
                       font=self.font)


def _tint(pixels: np.ndarray, mask: np.ndarray, factor: int, stroke: int,
          color: tuple[int, ...]) -> None:
    """Colour `pixels` (H, W, 3) uint8 where the mask is, its outline fully."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = _enlarge_mask(mask[window], factor)
    core = np.pad(inside, 1, constant_values=False)  # the inside without its outermost pixels
    for _ in range(2 * stroke):
        core[1:-1, 1:-1] &= (core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:])
    core = core[1:-1, 1:-1]
    part = pixels[tuple(slice(each.start * factor, each.stop * factor) for each in window)]
    mixed = 0.55 * part[inside] + 0.45 * np.array(color, dtype=np.float32)
    part[inside] = mixed.round().astype(np.uint8)
    part[inside & ~core] = color


def draw_instances(image: np.ndarray, boxes: np.ndarray, labels: Sequence[str],
                   masks: Iterable[np.ndarray] | None = None,
                   scores: Sequence[float] | None = None,
                   colors: Sequence[tuple[int, int, int]] | None = None,
                   enlarge: bool = True) -> Image.Image:
    """Draw boxes, masks and labels.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the image.
        labels: N names.
        masks: N of (H, W) bool, or None.
        scores: N numbers between 0 and 1, or None.
        colors: N colours; by default neighbours in the list differ.
        enlarge: make a small image larger.

    Returns:
        The picture, enlarged when the image is small.
    """
    if colors is None:
        colors = [_COLORS[number % len(_COLORS)] for number in range(len(labels))]
    picture, factor = _enlarge(image, enlarge)
    stroke = _stroke(picture)
    pixels = np.array(picture)
    for mask, color in zip(masks if masks is not None else (), colors, strict=False):
        _tint(pixels, np.asarray(mask, dtype=bool), factor, stroke, color)
    picture = Image.fromarray(pixels)
    draw, write = ImageDraw.Draw(picture), _Labels(picture, stroke)
    for box, color in zip(boxes, colors, strict=True):
        draw.rectangle([float(side) * factor for side in box], outline=color, width=2 * stroke)
    for number, (box, label, color) in enumerate(zip(boxes, labels, colors, strict=True)):
        text = label if scores is None else f'{label} {scores[number]:.2f}'
        left, top, _, bottom = (float(side) * factor for side in box)
        height = _FONT_SIZE * stroke + 2 * write.pad
        write(left, (top, top + height, bottom + height, bottom), text, color)
    return picture


def draw_regions(image: np.ndarray, labels: np.ndarray, names: Sequence[str],
                 palette: Sequence[Sequence[int]], ignore: int = 255,
                 enlarge: bool = True) -> Image.Image:
    """Draw a label map as colours over the image, each class named where it is largest.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers, indices into `names`, or `ignore`.
        names: One name per class.
        palette: One RGB colour per class.
        ignore: The label that stays uncoloured.
        enlarge: make a small image larger.

    Returns:
        The picture, enlarged when the image is small.
    """
    picture, factor = _enlarge(image, enlarge)
    stroke = _stroke(picture)
    pixels = np.array(picture)
    present = [int(label) for label in np.unique(labels) if label != ignore]
    tints = np.zeros((max(present, default=0) + 1, 3), dtype=np.float32)
    tints[present] = [palette[label] for label in present]
    for start in range(0, len(labels), _ROWS):
        part = _enlarge_mask(labels[start:start + _ROWS], factor)
        inside = part != ignore
        rows = pixels[start * factor:start * factor + len(part)]
        rows[inside] = (0.4 * rows[inside] + 0.6 * tints[part[inside]]).round()
    picture = Image.fromarray(pixels)
    write = _Labels(picture, stroke)
    for label in present:
        # A row where the class is widest, in the middle of its longest run there.
        inside = labels == label
        row = int(inside.sum(axis=1).argmax())
        columns = np.flatnonzero(inside[row])
        run = max(np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1), key=len)
        width = write.draw.textlength(names[label], font=write.font)
        bottom = row * factor + _FONT_SIZE * stroke
        height = _FONT_SIZE * stroke + 2 * write.pad
        write((run[0] + run[-1] + 1) / 2 * factor - width / 2,
              (bottom, bottom + height, bottom - height), names[label].strip(),
              tuple(palette[label]))
    return picture


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put titled pictures of equal height next to each other.

    Args:
        panels: Titles and pictures, left to right.

    Returns:
        One picture on white.
    """
    return sheet([panels])


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], title: str = '') -> Image.Image:
    """Put titled pictures in rows.

    Args:
        rows: from top to bottom, each of titles and pictures from left to right.
        title: a line on top of all.

    Returns:
        One picture on white; pictures of a column begin below one another.
    """
    font = _font()
    over = _FONT_SIZE + 2 * _MARGIN
    columns = [max(max(picture.width, math.ceil(font.getlength(text))) for text, picture in column)
               for column in itertools.zip_longest(*rows, fillvalue=('', _NOTHING))]
    heights = [over + max((picture.height for _, picture in row), default=0) for row in rows]
    top = over if title else 0
    width = max(sum(columns) + _MARGIN * (len(columns) + 1),
                math.ceil(font.getlength(title)) + 2 * _MARGIN)
    whole = Image.new('RGB', (width, top + sum(heights) + _MARGIN), 'white')
    draw = ImageDraw.Draw(whole)
    draw.text((_MARGIN, _MARGIN), title, fill='black', font=font)
    for row, height in zip(rows, heights, strict=True):
        x = _MARGIN
        for (text, picture), column in zip(row, columns, strict=False):
            draw.text((x, top + _MARGIN), text, fill='black', font=font)
            whole.paste(picture, (x, top + over))
            x += column + _MARGIN
        top += height
    return whole
