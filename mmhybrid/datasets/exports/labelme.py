"""LabelMe: one JSON file of shapes per image."""
from __future__ import annotations

import base64
import io
import json
import math
import os.path as osp
import re

import numpy as np
from PIL import Image

from ..label_images import UNREADABLE
from ..masks import bounding_box, mask_to_rle
from .common import (
    Export,
    ExportError,
    Files,
    Left,
    Picture,
    Questions,
    Thing,
    fitting_size,
    outline_box,
    split_of,
)

__all__ = ['read', 'shape_files']

_CORNERS = 32  # of the polygon that stands for a circle


def shape_files(files: Files) -> list[str]:
    """JSON files with a list of shapes near their beginning."""
    found = []
    for name in files.ending('.json'):
        with open(files.path(name), 'rb') as file:
            if re.search(rb'"shapes"\s*:', file.read(65536)):
                found.append(name)
    return found


def read(files: Files, questions: Questions) -> Export:
    """Read all files of LabelMe below a folder."""
    left, pictures, labels = Left(), {}, {}
    for name in shape_files(files):
        content = _content(files.path(name))
        reference = content.get('imagePath')
        if not isinstance(reference, str) or not reference:
            reference = f'{osp.splitext(osp.basename(name))[0]}.jpg'
        image = files.find(reference, name) or _beside(files, name)
        inside = ', which is inside that file only: save it beside' if image is None and \
            content.get('imageData') else ''
        said = content.get('imageWidth'), content.get('imageHeight')
        size = fitting_size(files, image, said, f'{reference} of {name}{inside}', left)
        if size is None:
            continue
        picture = pictures[image] = Picture(image, size, split_of(image))
        picture.things = _things(content['shapes'], size, name, left)
        labels.update(dict.fromkeys(thing.label for thing in picture.things))
    return Export('labelme', files.root, sorted(labels),
                  [pictures[key] for key in sorted(pictures)], notes=left.notes())


def _content(path: str) -> dict:
    try:
        with open(path, encoding='utf-8-sig') as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ExportError(f'{path} is not valid JSON: {error}. Correct it, or save it again in '
                          'LabelMe.') from error
    if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
        raise ExportError(f'{path}: "shapes" is not a list, so this is not a file of LabelMe.')
    return content


def _beside(files: Files, name: str) -> str | None:
    stem = osp.splitext(name)[0]
    return next((image for image in files.images if osp.splitext(image)[0] == stem), None)


def _things(shapes: list, size: tuple[int, int], name: str, left: Left) -> list[Thing]:
    things: dict[tuple, Thing] = {}
    for place, shape in enumerate(shapes):
        where = f'shape {place} of {name}'
        label = shape.get('label') if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            left.add('shape without a label: left out', where)
            continue
        thing = _thing(shape, label.strip(), size)
        if thing is None:
            kind = shape.get('shape_type')
            left.add(f'{kind}, which has no area or is not whole: left out', where)
            continue
        group = shape.get('group_id')
        key = (thing.label, place if group is None else f'group {group}')
        first = things.setdefault(key, thing)
        if first is not thing:  # parts of one object
            if isinstance(first.outlines, list) and isinstance(thing.outlines, list):
                first.outlines += thing.outlines
                first.box = outline_box(first.outlines)
            else:
                things[key, place] = thing
                left.add('part of a group that cannot be joined to the others: taken as an object',
                         where)
    return [*things.values()]


def _thing(shape: dict, label: str, size: tuple[int, int]) -> Thing | None:
    try:
        points = np.array(shape.get('points'), dtype=float)
    except (TypeError, ValueError):
        return None
    kind = shape.get('shape_type') or 'polygon'
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        return None
    if kind == 'rectangle' and len(points) in (2, 4):
        (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
        return Thing(label, [x0, y0, x1 - x0, y1 - y0])
    if kind == 'mask':
        return _mask(shape, label, points, size)
    if kind == 'circle' and len(points) == 2:
        points = _circle(*points)
    elif kind not in ('polygon', 'oriented_rectangle') or len(points) < 3:
        return None
    outline = points.ravel().tolist()
    return Thing(label, outline_box([outline]), [outline])


def _circle(centre: np.ndarray, edge: np.ndarray) -> np.ndarray:
    angles = np.arange(_CORNERS) * 2 * math.pi / _CORNERS
    radius = np.hypot(*(edge - centre))
    return centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _mask(shape: dict, label: str, points: np.ndarray, size: tuple[int, int]) -> Thing | None:
    """A picture of the object alone, as a PNG in text, and where its corner lies."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape.get('mask') or ''))) as image:
            part = np.asarray(image.convert('L')) > 0
    except (*UNREADABLE, TypeError):  # binascii.Error is a ValueError
        return None
    whole = np.zeros(size[::-1], bool)
    x, y = np.maximum(points.min(0).round().astype(int), 0)
    whole[y:y + part.shape[0], x:x + part.shape[1]] = part[
        :max(0, size[1] - y), :max(0, size[0] - x)]
    if not whole.any():
        return None
    return Thing(label, bounding_box(whole), mask_to_rle(whole))
