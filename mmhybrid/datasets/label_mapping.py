"""Colours and grey values of label images to class numbers."""
from __future__ import annotations

import os
import os.path as osp
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from .label_images import IGNORED, UNREADABLE, list_files

__all__ = ['map_labels', 'parse_mapping']

Colour = tuple[int, int, int]


def parse_mapping(entries: list[str]) -> dict[int, int] | dict[Colour, int]:
    """Read ``['0=0', '255=1']`` or ``['0,0,0=0', '255,0,0=1']``.

    Raises:
        ValueError: if an entry is none of these, or grey values and colours are mixed.
    """
    mapping = {}
    for entry in entries:
        try:
            left, number = entry.split('=')
            key = tuple(int(part) for part in left.split(','))
            mapping[key] = int(number)
        except ValueError:
            key = ()
        if len(key) not in (1, 3) or not 0 <= mapping[key] <= IGNORED:
            raise ValueError(f'{entry!r} is not a mapping; expected GREY=CLASS or RED,GREEN,'
                             'BLUE=CLASS with a class of 0 to 255, such as 255=1 or 255,0,0=1')
    lengths = set(map(len, mapping))
    if len(lengths) != 1:
        raise ValueError('expected either grey values or colours, not both or none')
    return mapping if lengths == {3} else {key[0]: number for key, number in mapping.items()}


def map_labels(source: str, target: str, mapping: Mapping,
               progress: Callable[[int, int], None] | None = None) -> int:
    """Write numbered copies of label images, as PNG.

    Values that are not in the mapping are an error, except in a JPEG, which has changed them: there
    each pixel takes the nearest one.

    Args:
        source: folder of label images, with folders below it or not.
        target: folder to write to; new, or empty.
        mapping: grey value (or palette index), or colour (red, green, blue), to class number.
        progress: called with the number of files done and of all.

    Returns:
        How many were written.

    Raises:
        ValueError: if a file cannot be read, holds other values, or two would be written to one.
        FileExistsError: if there is something in ``target``.
    """
    if not osp.isdir(source):
        raise ValueError(f'{source} is not a folder')
    if osp.isdir(target) and os.listdir(target):
        raise FileExistsError(f'{target} is not empty; give a new folder')
    listing = list_files(source)
    if listing.loops or not listing.names:
        raise ValueError(f'{source} ' + (f'holds a link to a folder above it: {listing.loops[0]}'
                                         if listing.loops else 'holds no files'))
    goals = {}
    for name in listing.names:
        goal = osp.splitext(name)[0] + '.png'
        if goal in goals:
            raise ValueError(f'{goals[goal]} and {name} in {source} would both become {goal}')
        goals[goal] = name
    for done, (goal, name) in enumerate(goals.items(), 1):
        labels = _number(osp.join(source, name), mapping)
        path = osp.join(target, goal)
        os.makedirs(osp.dirname(path), exist_ok=True)
        Image.fromarray(labels).save(path)
        if progress is not None:
            progress(done, len(goals))
    return len(goals)


def _number(path: str, mapping: Mapping) -> np.ndarray:
    colours = isinstance(next(iter(mapping)), tuple)
    try:
        with Image.open(path) as image:
            lossy = image.format == 'JPEG'
            values = np.asarray(image.convert('RGB') if colours else image)
    except UNREADABLE as error:
        raise ValueError(f'{path} cannot be read as an image: {error}') from error
    if not colours and values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise ValueError(f'{path} is in colour; give colours, such as 255,0,0=1')
        values = values[..., 0]
    codes = _codes(values) if colours else values.astype(np.int64)
    found, places = np.unique(codes, return_inverse=True)
    distance = np.full(found.shape, np.inf)
    numbers = np.zeros(found.shape, dtype=np.uint8)
    for key, number in mapping.items():
        away = _distance(found, key)
        numbers[away < distance] = number
        distance = np.minimum(away, distance)
    unknown = found[distance > 0]
    if len(unknown) and not lossy:
        shown = ' '.join(','.join(map(str, _colour(code))) if colours else str(code)
                         for code in unknown[:5].tolist())
        raise ValueError(f'{path} holds {len(unknown)} values without a class, for example {shown}.'
                         ' Add them, such as VALUE=255 for "ignore"')
    return numbers[places].reshape(codes.shape)


def _codes(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) bytes to one number each, which sort much faster."""
    return picture.astype(np.int64) @ np.array([65536, 256, 1])


def _colour(code):
    return code >> 16, code >> 8 & 255, code & 255


def _distance(found: np.ndarray, key) -> np.ndarray:
    if isinstance(key, tuple):
        return sum(np.abs(part - value) for part, value in zip(_colour(found), key, strict=True))
    return np.abs(found - key)
