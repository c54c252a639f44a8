"""An annotation file of COCO's form as columns: a few arrays in place of millions of objects.

What does not have the type or the shape of its column is a problem that names its record. Whether
the file fits a config is another matter: see annotations.py.
"""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import hypot

import numpy as np

from .coco_file import in_json, read_coco

__all__ = ['Records', 'coco_records', 'forget_records', 'load_records', 'several']

FAR = 1e6  # pixels; pycocotools walks along every edge of a polygon, pixel by pixel
LARGEST_AREA = 1e10  # COCO's evaluation takes nothing above it
EXAMPLES = 3


@dataclass
class Records:
    """Columns of an annotation file: I images, C categories, A annotations.

    Attributes:
        image_ids: (I), numbers or text.
        names: (I), of the files.
        sizes: (I, 2) float, width and height.
        categories: (C), pairs of id and name.
        ids: (A), numbers or text; int or object.
        image: (A) int, places in ``image_ids``; -1 is none of them.
        category: (A) int, places in ``categories``; -1 is none of them.
        boxes: (A, 4) float, x, y, width, height.
        areas: (A) float.
        crowd, ignored: (A) bool, the flags iscrowd and ignore.
        without_crowd: how many annotations have no iscrowd.
        faults: place of an annotation -> what is wrong with its segmentation.
        partial: place of an annotation -> what is wrong with some polygons; the others are good.
        unmasked, coded: (A) bool, has no segmentation at all, or run lengths as one.
    """

    image_ids: list
    names: list
    sizes: np.ndarray
    categories: list
    ids: np.ndarray
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    without_crowd: int
    faults: dict
    partial: dict
    unmasked: np.ndarray
    coded: np.ndarray


def load_records(path: str, tell: Callable[[str], None] | None = None
                 ) -> tuple[Records | None, list[str]]:
    """Read a file once, however often it is asked for, until it changes.

    Args:
        path: the file.
        tell: called with one line before a large file is read.

    Returns:
        As :func:`coco_records`.

    Raises:
        AnnotationError: if it is not a file of COCO's form.
    """
    try:
        state = os.stat(path)
        return _load(path, state.st_mtime_ns, state.st_size, tell)
    except OSError:  # reading says why
        return coco_records(read_coco(path, tell))


@lru_cache(maxsize=8)
def _load(path: str, changed: int, size: int, tell):
    return coco_records(read_coco(path, tell))


forget_records = _load.cache_clear


def coco_records(content: dict) -> tuple[Records | None, list[str]]:
    """Columns of a file.

    Args:
        content: of the file, as :func:`read_coco` returns it.

    Returns:
        The columns, and problems ("has 2 annotations whose ..."). Columns are None if there are
        problems.
    """
    images, categories = content['images'], content['categories']
    annotations = content.get('annotations', [])
    problems = _no_objects(images=images, categories=categories, annotations=annotations)
    if problems:
        return None, problems
    for what, entries, columns in (('images', images, IMAGES),
                                   ('categories', categories, CATEGORIES),
                                   ('annotations', annotations, ANNOTATIONS)):
        for key, (fits, expected) in columns.items():
            problems += _wrong(what, entries, key, fits, expected)
    for key in FLAGS:
        problems += _wrong('annotations', annotations, key, _is_flag, '0 or 1', optional=True)
    problems = problems or (
        _mixed('image', images, annotations) + _mixed('category', categories, annotations)
        + _twice('image', images) + _twice('annotation', annotations)
        + _twice('category', categories))
    if problems:
        return None, problems
    sizes = np.array([(entry['width'], entry['height']) for entry in images], float).reshape(-1, 2)
    places = {entry['id']: place for place, entry in enumerate(images)}
    kinds = {entry['id']: place for place, entry in enumerate(categories)}
    image = _array((places.get(entry['image_id'], -1) for entry in annotations), int)
    faults, partial, unmasked, coded = _segmentations(annotations, image, sizes)
    crowd, ignored = (_array((bool(entry.get(key)) for entry in annotations), bool)
                      for key in FLAGS)
    return Records(
        image_ids=list(places), names=[entry['file_name'] for entry in images], sizes=sizes,
        categories=[(entry['id'], entry['name']) for entry in categories],
        ids=_compact([entry['id'] for entry in annotations]), image=image,
        category=_array((kinds.get(entry['category_id'], -1) for entry in annotations), int),
        boxes=_array(chain.from_iterable(entry['bbox'] for entry in annotations), float
                     ).reshape(-1, 4),
        areas=_array((entry['area'] for entry in annotations), float),
        crowd=crowd, ignored=ignored,
        without_crowd=sum(entry.get('iscrowd') is None for entry in annotations),
        faults=faults, partial=partial, unmasked=unmasked, coded=coded), []


def several(what: str, ids: list) -> str:
    """The number of records and the ids of the first: '5 annotations (id 3, 8, 12, ...)'."""
    listed = ', '.join(in_json(number) for number in ids[:EXAMPLES])
    more = ', ...' if len(ids) > EXAMPLES else ''
    return f'{len(ids)} {what}{"s" if len(ids) > 1 else ""} (id {listed}{more})'


def _array(values, kind) -> np.ndarray:
    return np.fromiter(values, kind)


def _compact(ids: list) -> np.ndarray:
    """Numbers outside Python's heap, where they would keep all around them from being freed."""
    return np.array(ids, np.int64 if {*map(type, ids)} <= {int} else object)


# Types and shapes -------------------------------------------------------------------------------
def _is_number(value) -> bool:
    return type(value) is int or type(value) is float


def _is_id(value) -> bool:
    if type(value) is float:
        return value.is_integer() and abs(value) < 2**53
    return type(value) is str or type(value) is int and abs(value) < 2**63


def _is_name(value) -> bool:
    if type(value) is not str or not value or '\0' in value:
        return False
    return value.isascii() or _is_encodable(value)


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_side(value) -> bool:
    return _is_number(value) and 1 <= value <= FAR and value == int(value)


def _is_box(value) -> bool:
    if type(value) is not list or len(value) != 4:
        return False
    x, y, w, h = value
    return (_is_number(x) and _is_number(y) and _is_number(w) and _is_number(h)
            and -FAR <= x <= FAR and -FAR <= y <= FAR and -FAR <= w <= FAR and -FAR <= h <= FAR)


def _is_area(value) -> bool:
    return _is_number(value) and -LARGEST_AREA <= value <= LARGEST_AREA


def _is_flag(value) -> bool:
    return value is None or type(value) in (int, float, bool) and value in (0, 1)


AN_ID = (_is_id, 'a number or a text that identifies it')
A_SIDE = (_is_side, 'a whole number of pixels')
IMAGES = {'id': AN_ID, 'file_name': (_is_name, 'the name of a file'), 'width': A_SIDE,
          'height': A_SIDE}
CATEGORIES = {'id': AN_ID, 'name': (lambda value: type(value) is str, 'a text')}
ANNOTATIONS = {'id': AN_ID, 'image_id': (_is_id, 'the id of an image'),
               'category_id': (_is_id, 'the id of a category'),
               'bbox': (_is_box, 'four numbers [x, y, width, height] in pixels'),
               'area': (_is_area, 'a number of pixels')}
FLAGS = ('iscrowd', 'ignore')


def _no_objects(**lists) -> list[str]:
    problems = []
    for what, entries in lists.items():
        wrong = [place for place, entry in enumerate(entries) if type(entry) is not dict]
        if wrong:
            listed = _examples(f'{what}[{place}] is {in_json(entries[place])}' for place in wrong)
            problems.append(f'has {len(wrong)} of {len(entries)} {what} that are not objects '
                            f'{{"id": ...}}: {listed}')
    return problems


def _wrong(what: str, entries: list, key: str, fits, expected: str,
           optional: bool = False) -> list[str]:
    """A problem if records lack a key, or hold something else than expected."""
    if not optional:
        without = [place for place, entry in enumerate(entries) if key not in entry]
        if without:
            names = _examples(_called(what, entries, place) for place in without)
            needed = ', '.join(IMAGES if what == 'images' else CATEGORIES
                               if what == 'categories' else ANNOTATIONS)
            return [f'has {what} without "{key}" ({len(without)} of {len(entries)}: {names}). '
                    f'Each needs {needed}']
    wrong = [place for place, entry in enumerate(entries) if not fits(entry.get(key))]
    if not wrong:
        return []
    listed = _examples(f'{_called(what, entries, place)} has {in_json(entries[place][key])}'
                       for place in wrong)
    return [f'has {what} whose "{key}" is not {expected} ({len(wrong)} of {len(entries)}): '
            f'{listed}']


def _called(what: str, entries: list, place: int) -> str:
    """A record's id, or its place in the list if it has none that could be looked for."""
    number = entries[place].get('id')
    return f'id {in_json(number)}' if _is_id(number) else f'{what}[{place}]'


def _examples(sentences) -> str:
    shown = []
    for sentence in sentences:
        if len(shown) == EXAMPLES:
            return ', '.join([*shown, '...'])
        shown.append(sentence)
    return ', '.join(shown)


def _mixed(what: str, entries: list, annotations: list) -> list[str]:
    """A problem if some ids are text and some are numbers: "1" and 1 are not the same."""
    plural = 'categories' if what == 'category' else f'{what}s'
    examples = {}
    for where, listed, key in ((plural, entries, 'id'), ('annotations', annotations, f'{what}_id')):
        values = [entry[key] for entry in listed]
        for kind in set(map(type, values)):
            place = next(place for place, value in enumerate(values) if type(value) is kind)
            name = '' if key == 'id' else f', {_called(where, listed, place)}'
            examples[kind is str] = f'"{key}": {in_json(values[place])} in {where}{name}'
    if len(examples) == 2:
        return [f'has ids of {plural} that are numbers in one place ({examples[False]}) and text '
                f'in another ({examples[True]}), which never match. Write all as numbers']
    return []


def _twice(what: str, entries: list) -> list[str]:
    counts = Counter(entry['id'] for entry in entries)
    if len(counts) == len(entries):
        return []
    twice = [number for number, count in counts.items() if count > 1]
    listed = _examples(f'{what} id {in_json(number)} {counts[number]} times' for number in twice)
    return [f'has {listed}. Ids must be unique; the last one would replace the others']


# Segmentations ----------------------------------------------------------------------------------
def _segmentations(annotations: list, image: np.ndarray, sizes: np.ndarray):
    """Faults of each segmentation, whether or not a config needs it."""
    faults, partial, compressed = {}, {}, []
    unmasked, coded = np.zeros((2, len(annotations)), bool)
    for place, entry in enumerate(annotations):
        shape = entry.get('segmentation')
        if not shape:
            unmasked[place] = True
        elif type(shape) is list:
            wrong, good = _polygon_faults(shape)
            if wrong:
                (partial if good else faults)[place] = wrong
        elif type(shape) is not dict:
            faults[place] = f'{in_json(shape)} in place of polygons or run lengths'
        else:
            coded[place] = True
            fault = _run_length_fault(shape, sizes[image[place]] if image[place] >= 0 else None)
            if fault:
                faults[place] = fault
            elif type(shape['counts']) is str:
                compressed.append((place, shape['counts'], shape['size'][0] * shape['size'][1]))
    faults.update(_compressed_faults(compressed))
    return faults, partial, unmasked, coded


def _polygon_faults(polygons: list) -> tuple[str | None, bool]:
    """What is wrong with the first bad polygon, and whether the object is there without it."""
    first, short = None, 0
    for polygon in polygons:
        if type(polygon) is not list:
            return (f'{in_json(polygon)} in place of a polygon (a segmentation is a list of '
                    'polygons, and each of these a list [x1, y1, x2, y2, ...])'), False
        try:
            size = hypot(*polygon)
        except (TypeError, OverflowError):
            size = FAR
        if not size < FAR:
            fault = _coordinate_fault(polygon)
            if fault:
                return fault, False
        if len(polygon) < 6 or len(polygon) % 2:
            first = first or (f'a polygon of {len(polygon)} numbers (it takes an even number of '
                              'them, six or more)')
            short += 1
    return first, short < len(polygons)


def _coordinate_fault(polygon: list) -> str | None:
    for value in polygon:
        if type(value) is list:
            return 'a polygon of lists; expected the numbers themselves, [x1, y1, x2, y2, ...]'
        if not _is_number(value):
            return f'a polygon with {in_json(value)} in place of a number'
        if not -FAR <= value <= FAR:
            return f'a polygon with the coordinate {in_json(value)}'
    return None


def _run_length_fault(code: dict, size: np.ndarray | None) -> str | None:
    """What is wrong with run lengths; the text of compressed ones is read later, all at once."""
    counts, shape = code.get('counts'), code.get('size')
    if 'counts' not in code or 'size' not in code:
        return f'an object with {in_json(list(code))}; run lengths have "counts" and "size"'
    if type(shape) is not list or len(shape) != 2 or not all(map(_is_side, shape)):
        return f'run lengths whose "size" is {in_json(shape)}; expected [height, width]'
    if size is not None and shape != [size[1], size[0]]:
        return (f'run lengths of size {in_json(shape)}, but its image has [height, width] '
                f'[{size[1]:.0f}, {size[0]:.0f}]')
    if type(counts) is str:
        return None
    if type(counts) is not list or not {*map(type, counts)} <= {int, float}:
        return f'run lengths whose "counts" is {in_json(counts)}; expected numbers or text'
    if not all(0 <= count <= shape[0] * shape[1] and count == int(count) for count in counts):
        return 'run lengths whose "counts" has a number that is not a length'
    return _sum_fault(sum(counts), shape[0] * shape[1])


def _sum_fault(total: int, pixels: int) -> str | None:
    if total == pixels:
        return None
    return f'run lengths of {total:.0f} pixels together; its size has {pixels:.0f}'


def _compressed_faults(compressed: list) -> dict[int, str]:
    """Faults of compressed run lengths, given as (place, text, pixels)."""
    faults, chunk, letters = {}, [], 0
    for place, text, pixels in compressed:
        if not text or not text.isascii():
            faults[place] = f'run lengths with {in_json(text)} in place of compressed "counts"'
            continue
        chunk.append((place, text, pixels))
        letters += len(text)
        if letters > 2**22:
            faults.update(_chunk_faults(chunk))
            chunk, letters = [], 0
    if chunk:
        faults.update(_chunk_faults(chunk))
    return faults


def _chunk_faults(chunk: list) -> dict[int, str]:
    """Decode compressed run lengths as pycocotools does, all of a chunk together.

    A letter holds 5 bits of a number, the lowest first, and whether more follow; the last bit is
    the sign. From the fourth on, a number is the difference from the last but one.
    """
    lengths = np.array([len(text) for _, text, _ in chunk])
    codes = np.frombuffer(''.join(text for _, text, _ in chunk).encode(), np.uint8).astype(int) - 48
    last = np.cumsum(lengths) - 1  # letter of each text
    owner = np.repeat(np.arange(len(chunk)), lengths)
    final = codes & 32 == 0  # letter of its number
    bad = np.zeros(len(chunk), bool)
    bad[owner[(codes < 0) | (codes > 63)]] = True
    bad[~final[last]] = True
    final[last] = True
    starts = np.flatnonzero(np.concatenate([[True], final[:-1]]))
    digit = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    bad[owner[digit > 9]] = True
    values = np.add.reduceat((codes & 31) << 5 * np.minimum(digit, 10), starts)
    ends = np.flatnonzero(final)
    negative = codes[ends] & 16 != 0
    values = values - np.where(negative, 1 << 5 * (np.minimum(digit[ends], 10) + 1), 0)
    of = owner[ends]
    bad[of[np.abs(values) > 2**40]] = True
    first = np.searchsorted(of, np.arange(len(chunk)))
    order = np.arange(len(values)) - first[of]
    runs = values.copy()
    for parity in (1, 2):
        chosen = np.flatnonzero((order % 2 == parity % 2) & (order > 0))
        sums = np.cumsum(values[chosen])
        begins = np.searchsorted(of[chosen], np.arange(len(chunk)))
        before = np.concatenate([[0], sums])[begins]
        runs[chosen] = sums - before[of[chosen]]
    bad[of[runs < 0]] = True
    totals = np.bincount(of, runs, len(chunk))
    faults = {}
    for index in np.flatnonzero(bad | (totals != [pixels for _, _, pixels in chunk])):
        place, text, pixels = chunk[index]
        faults[place] = (f'run lengths with {in_json(text)} in place of compressed "counts"'
                         if bad[index] else _sum_fault(totals[index], pixels))
    return faults
