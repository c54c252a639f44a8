"""Images with label images: class numbers, palettes, colours, or black and white."""
from __future__ import annotations

import csv
import os.path as osp
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from ..label_images import IGNORED
from .common import (
    Export,
    ExportError,
    Files,
    Left,
    Picture,
    Questions,
    image_size,
    lines_of,
    listed_splits,
    split_of,
)

__all__ = ['numbered', 'pairs', 'read']

_LABELS = ('mask', 'masks', 'label', 'labels', 'labelids', 'annotation', 'annotations', 'annot',
           'segmentationclass', 'segmentation', 'segmentations', 'seg', 'gt', 'groundtruth',
           'ground_truth')
_IMAGES = ('image', 'images', 'img', 'imgs', 'jpegimages', 'photos', 'rgb', 'input', 'inputs')
_OTHERS = ('segmentationobject',)  # VOC's and CVAT's numbers of objects
_SUFFIX = re.compile(rf'[_.-]({"|".join(_LABELS)})$', re.IGNORECASE)
_MOST = 64  # colours; more come from smooth edges or a lossy format
_VOID = (224, 224, 192)  # borders of objects in VOC


def pairs(files: Files) -> dict[str, str]:
    """Name of each image with a label image -> name of that."""
    labels, images = {}, {}
    for name in files.images:
        *folders, base = name.split('/')
        lowered = [folder.lower() for folder in folders]
        stem = osp.splitext(base)[0]
        if any(folder in _OTHERS for folder in lowered):
            continue
        is_label = any(folder in _LABELS for folder in lowered) or _SUFFIX.search(stem)
        words = _LABELS if is_label else _IMAGES
        key = (*(folder for folder in folders if folder.lower() not in words),
               _SUFFIX.sub('', stem) if is_label else stem)
        (labels if is_label else images).setdefault(key, name)
    stems = Counter(key[-1] for key in labels)
    lone = {key[-1]: name for key, name in labels.items() if stems[key[-1]] == 1}
    found = {name: labels.get(key) or lone.get(key[-1]) for key, name in images.items()}
    return {name: label for name, label in found.items() if label}


@dataclass
class _Values:
    """What label images hold: value -> pixels, and an example of a file for each."""

    colours: bool
    pixels: Counter
    example: dict


def read(files: Files, questions: Questions) -> Export:
    """Read images and label images, and find out what their values mean."""
    left, splits, pictures = Left(), listed_splits(files), []
    for image, label in sorted(pairs(files).items()):
        sizes = image_size(files.path(image)), image_size(files.path(label))
        if None in sizes:
            left.add('pair of which one cannot be read: left out', f'{image} and {label}')
        elif sizes[0] != sizes[1]:
            left.add('image whose label image has another size: left out',
                     f'{image} ({sizes[0][0]}x{sizes[0][1]}) and {label} '
                     f'({sizes[1][0]}x{sizes[1][1]})')
        else:
            stem = osp.splitext(osp.basename(image))[0]
            pictures.append(Picture(image, sizes[0], splits.get(stem) or split_of(image),
                                    labels=label))
    if not pictures:
        raise ExportError(f'{files.root}: no image and label image fit together. '
                          + '; '.join(left.notes()))
    lonely = [name for name in files.images if name not in {one.name for one in pictures}
              and name not in {one.labels for one in pictures}]
    for name in lonely:
        left.add('image without a label image: left out', name)
    described = _described(files)
    values = _values(files, pictures, described)
    notes = left.notes()
    classes, numbers = _meaning(files, values, described, questions, notes)
    return Export('masks', files.root, classes, pictures, numbers, notes)


def _open(path: str) -> np.ndarray:
    """(H, W) grey values or palette indices, or (H, W, 3) colours."""
    with Image.open(path) as image:
        if image.mode in ('LA', 'RGBA', 'CMYK', 'YCbCr', 'PA'):
            image = image.convert('L' if image.mode == 'LA' else 'RGB')
        return np.asarray(image)


def _as_colours(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


def _codes(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _colour(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 255, code & 255


def _values(files: Files, pictures: list[Picture], described: dict) -> _Values:
    """Count the values of each label image; as colours if they, or a label map, have these."""
    in_colour = any(isinstance(value, tuple) for value in described)
    examples = {}
    for one in pictures:
        path = files.path(one.labels)
        pixels = _as_colours(path) if in_colour else _open(path)
        if pixels.ndim == 3:
            kind = 'grey in colour' if (pixels == pixels[..., :1]).all() else 'colour'
            one.pixels = {_colour(code): n for code, n in _counted(_codes(pixels)).items()}
        else:
            kind, one.pixels = 'grey', _counted(pixels)
        examples.setdefault(kind, one.labels)
    if {'grey', 'colour'} <= set(examples):
        raise ExportError(f'{examples["colour"]} holds colours and {examples["grey"]} grey values '
                          'or palette indices. Export all label images in one way.')
    colours = in_colour or 'colour' in examples
    values = _Values(colours, Counter(), {})
    for one in pictures:
        if not colours:
            one.pixels = {value[0] if isinstance(value, tuple) else value: n
                          for value, n in one.pixels.items()}
        values.pixels.update(one.pixels)
        for value in one.pixels:
            values.example.setdefault(value, one.labels)
    return values


def _counted(codes: np.ndarray) -> dict[int, int]:
    if codes.dtype == bool:
        codes = codes.astype(np.uint8)
    if codes.min() < 0 or codes.max() >= 2**24:
        found, counts = np.unique(codes, return_counts=True)
    else:
        counts = np.bincount(codes.ravel())
        found = np.flatnonzero(counts)
        counts = counts[found]
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _described(files: Files) -> dict:
    """Value -> name, from a labelmap.txt (CVAT), a _classes.csv (Roboflow) or a list of names."""
    for name in files.ending('labelmap.txt'):
        found = {}
        for line in lines_of(files.path(name)):
            label, _, rest = line.partition(':')
            colour = rest.partition(':')[0].split(',')
            if line.startswith('#'):
                continue
            if len(colour) != 3 or not all(part.strip().isdecimal() and int(part) < 256
                                           for part in colour):
                raise ExportError(f'{files.path(name)}: {line!r} is not NAME:RED,GREEN,BLUE:PARTS:'
                                  'ACTIONS. Correct it.')
            found[tuple(map(int, colour))] = label.strip()
        return found
    for name in files.ending('_classes.csv'):
        rows = [row for row in csv.reader(lines_of(files.path(name)))
                if len(row) >= 2 and row[0].strip().isdecimal()]
        return {int(row[0]): row[1].strip() for row in rows}
    for name in files.ending('classes.txt', 'label_names.txt'):
        return dict(enumerate(lines_of(files.path(name))))
    return {}


def _meaning(files: Files, values: _Values, described: dict, questions: Questions,
             notes: list[str]) -> tuple[list[str], dict]:
    """Names of the classes, and value -> number of a class or 255."""
    present = sorted(values.pixels)
    if not values.colours and present[-1] > IGNORED:
        raise ExportError(f'{values.example[present[-1]]} holds the value {present[-1]}; expected '
                          'class numbers of 0 to 255.')
    if described:
        return _as_described(values, present, described, notes)
    if len(present) > _MOST and (values.colours or present != [*range(len(present))]):
        middle = present[len(present) // 2]
        raise ExportError(
            f'The label images hold {len(present)} different values, for example {_shown(middle)} '
            f'in {values.example[middle]}: more than classes can be, as smooth edges and JPEG make '
            'them. Export them without smoothing as PNG, or map them with tools/map_labels.py.')
    numbers = _without_ignored(values, present, questions, notes)
    kept = [value for value in present if value not in numbers]
    listing = ', '.join(f'{_shown(value)} ({values.pixels[value] / values.pixels.total():.1%} of '
                        'the pixels)' for value in kept)
    answer = questions.choose(
        'classes', f'The label images hold {listing}, and nothing in {files.root} names the '
        'classes. Names in this order, with commas.', None,
        ','.join(_default_name(value, kept) for value in kept))
    names = [name.strip() for name in answer.split(',')]
    if len(names) != len(kept) or '' in names or len(set(names)) != len(names):
        raise ExportError(f'--classes {answer} has {len(names)} names; expected {len(kept)} '
                          f'different ones, for {listing}.')
    return names, numbers | {value: number for number, value in enumerate(kept)}


def _as_described(values: _Values, present: list, described: dict, notes: list[str]):
    numbers = {value: number for number, value in enumerate(described)}
    if values.colours:
        numbers.setdefault(_VOID, IGNORED)
    elif IGNORED in present and IGNORED not in numbers:
        numbers[IGNORED] = IGNORED
        notes.append('the value 255 of the label images is not a class: left out of loss and '
                     'scores')
    for value in present:
        if value not in numbers:
            raise ExportError(f'{values.example[value]} holds {_shown(value)}, which the list of '
                              'classes does not have. Add it there.')
    return [*described.values()], numbers


def _without_ignored(values: _Values, present: list, questions: Questions, notes: list[str]
                     ) -> dict:
    """{255: 255} where 255 is not a class."""
    if values.colours or IGNORED not in present or len(present) < 3:
        return {}
    others = present[:-1]
    plain = others == [*range(len(others))]
    if plain and 'ignore' not in questions.given:
        notes.append('the value 255 of the label images, beside class numbers from 0: left out of '
                     'loss and scores')
        return {IGNORED: IGNORED}
    answer = questions.choose(
        'ignore', f'The label images hold {", ".join(map(str, present))}. Is 255 a class, or left '
        'out of loss and scores?', ('255', 'none'), '255' if plain else 'none')
    return {IGNORED: IGNORED} if answer == '255' else {}


def _default_name(value, kept: list) -> str:
    if value in (0, (0, 0, 0)):
        return 'background'
    if len(kept) == 2:
        return 'foreground'
    return 'class_{:02x}{:02x}{:02x}'.format(*value) if isinstance(value, tuple) \
        else f'class_{value}'


def _shown(value) -> str:
    return '/'.join(map(str, value)) if isinstance(value, tuple) else str(value)


def numbered(path: str, numbers: dict) -> np.ndarray:
    """A label image as class numbers.

    Args:
        path: the file.
        numbers: value -> class number.

    Returns:
        (H, W) uint8.
    """
    table = _table(tuple(numbers.items()))
    if len(table) > IGNORED + 1:
        return table[_codes(_as_colours(path))]
    pixels = _open(path)
    return table[(pixels[..., 0] if pixels.ndim == 3 else pixels).astype(np.uint8)]


@lru_cache(maxsize=2)
def _table(numbers: tuple) -> np.ndarray:
    """Class number of each value: 256 grey ones, or all colours."""
    colours = any(isinstance(value, tuple) for value, _ in numbers)
    table = np.full(2**24 if colours else 256, IGNORED, np.uint8)
    for value, number in numbers:
        table[_codes(np.array(value)) if colours else value] = number
    return table
