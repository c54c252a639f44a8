"""YOLO's text files: one line per object, in parts of the image; boxes or outlines."""
from __future__ import annotations

import math
import os.path as osp
import re
from collections import Counter

import yaml

from .common import (
    Export,
    ExportError,
    Files,
    Left,
    Picture,
    Questions,
    Thing,
    image_size,
    lines_of,
    outline_box,
    split_of,
)

__all__ = ['label_files', 'read']

_LISTS = ('classes.txt', 'obj.names', '_darknet.labels', 'labels.txt', 'predefined_classes.txt')
_LINE = re.compile(r'\s*\d+(\s+[-+]?[\d.]+(e[-+]?\d+)?){4,}\s*$', re.IGNORECASE)


def label_files(files: Files) -> dict[str, str]:
    """Name of each image with a label file -> name of that."""
    texts = {name for name in files.ending('.txt') if osp.basename(name).lower() not in _LISTS
             and _is_label_file(files.path(name))}
    stems = Counter(osp.splitext(osp.basename(name))[0] for name in files.images)
    lone = {osp.splitext(osp.basename(name))[0]: name for name in texts}
    found = {}
    for image in files.images:
        place, stem = osp.splitext(image)[0], osp.splitext(osp.basename(image))[0]
        near = next((name for name in _places(place) if name in texts), None)
        if near or (stems[stem] == 1 and stem in lone):
            found[image] = near or lone[stem]
    return found


def _places(stem: str):
    """The folder of labels mirrors that of images, or the labels are beside the images."""
    parts = stem.split('/')
    for place in reversed(range(len(parts) - 1)):
        if parts[place].lower() == 'images':
            yield '/'.join([*parts[:place], 'labels', *parts[place + 1:]]) + '.txt'
    yield f'{stem}.txt'


def _is_label_file(path: str) -> bool:
    """Whether the first line is one, or there is none: an image without objects."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            line = next((line for line in file if line.strip()), '')
    except UnicodeDecodeError:
        return False
    return not line or bool(_LINE.match(line))


def read(files: Files, questions: Questions) -> Export:
    """Read a folder of images and label files."""
    classes, described, keypoints = _description(files, questions)
    labels, left, pictures = label_files(files), Left(), []
    for name in files.images:
        size = image_size(files.path(name))
        if size is None:
            left.add('image that cannot be read: left out', name)
            continue
        picture = Picture(name, size, _split(name, described))
        if name in labels:
            picture.things = _things(files.path(labels[name]), size, classes, keypoints, left)
        pictures.append(picture)
    without = len(pictures) - len(labels)
    if without > 0:
        left.reasons['image without a label file: taken as one without objects'] = [
            without, next(one.name for one in pictures if one.name not in labels)]
    return Export('yolo', files.root, classes, pictures, notes=left.notes())


def _description(files: Files, questions: Questions) -> tuple[list[str], dict[str, str], int]:
    """Classes, folder or file -> split, and how many numbers of keypoints follow a box."""
    found = []
    for name in files.ending('.yaml', '.yml'):
        content = _yaml(files.path(name))
        if isinstance(content, dict) and 'names' in content:
            found.append((name, content))
    if len({str(content['names']) for _, content in found}) > 1:
        raise ExportError('Several files name the classes of YOLO, and they differ: '
                          f'{", ".join(files.path(name) for name, _ in found)}. Remove all but '
                          'one, or give a folder further down.')
    if found:
        name, content = found[0]
        shape = content.get('kpt_shape')
        numbers = isinstance(shape, list) and all(type(each) is int for each in shape)
        return (_names(files.path(name), content['names']), _folders(files, name, content),
                math.prod(shape) if numbers and shape else 0)
    lists = [name for name in files.ending(*_LISTS) if osp.basename(name).lower() in _LISTS]
    if lists:
        return lines_of(files.path(lists[0])), {}, 0
    return _asked(files, questions), {}, 0


def _yaml(path: str):
    try:
        with open(path, encoding='utf-8-sig') as file:
            return yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExportError(f'{path} cannot be read as YAML: {" ".join(str(error).split())}. '
                          'Correct it.') from error


def _names(path: str, names) -> list[str]:
    if isinstance(names, dict):
        numbers = sorted(names, key=lambda key: int(key) if str(key).isdigit() else -1)
        if [str(number) for number in numbers] != [str(i) for i in range(len(numbers))]:
            raise ExportError(f'{path}: the keys of "names" are {", ".join(map(str, numbers))}; '
                              'expected numbers from 0 without gaps.')
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names:
        raise ExportError(f'{path}: "names" is {names!r}; expected the list of classes.')
    return [str(name).strip() for name in names]


def _asked(files: Files, questions: Questions) -> list[str]:
    highest = -1
    for name in label_files(files).values():
        highest = max([highest, *(int(line.split()[0]) for line in lines_of(files.path(name))
                                  if _LINE.match(line))])
    answer = questions.choose(
        'classes', f'{files.root} has label files of YOLO, but no data.yaml, classes.txt or '
        f'obj.names with the names of its {highest + 1} classes.', None,
        ','.join(f'class_{number}' for number in range(highest + 1)))
    return [name.strip() for name in answer.split(',')]


def _folders(files: Files, name: str, content: dict) -> dict[str, str]:
    """Folders or images (relative) -> split, as the YAML file names them, if they are there."""
    found, here = {}, osp.dirname(files.path(name))
    for key, split in (('train', 'train'), ('val', 'val'), ('valid', 'val'), ('test', 'test')):
        value = content.get(key)
        for entry in value if isinstance(value, list) else [value] if value else []:
            place = _place(here, str(content.get('path') or ''), str(entry))
            if place is None:
                continue
            if osp.isfile(place):
                for line in lines_of(place):
                    image = files.find(line, name)
                    if image is not None:
                        found[image] = split
            else:
                found[osp.relpath(place, files.root).replace('\\', '/')] = split
    return found


def _place(here: str, base: str, entry: str) -> str | None:
    """Where a path of a YAML file leads; Roboflow's lead one folder too far up."""
    for start in (osp.join(here, base), here):
        for path in (entry, re.sub(r'^(\.\./)+', '', entry)):
            if osp.exists(osp.join(start, path)):
                return osp.abspath(osp.join(start, path))
    return None


def _split(name: str, described: dict[str, str]) -> str | None:
    place = name
    while place:
        if place in described:
            return described[place]
        place = osp.dirname(place)
    return split_of(name)


def _things(path: str, size: tuple[int, int], classes: list[str], keypoints: int, left: Left
            ) -> list[Thing]:
    things = []
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            where, parts = f'line {number} of {path}', line.split()
            if not parts:
                continue
            values = [_number(part) for part in parts]
            if None in values or len(values) < 5 or values[0] != int(values[0]):
                left.add('line that is not a class number and four or more coordinates: left out',
                         where)
            elif not 0 <= values[0] < len(classes):
                raise ExportError(f'{where} has the class {parts[0]}, and there are '
                                  f'{len(classes)}: {", ".join(classes[:8])}. Correct the line, '
                                  'or the names.')
            elif any(not -1 <= value <= 2 for value in values[1:5]):
                raise ExportError(f'{where} has coordinates of pixels; expected parts of the '
                                  'image, from 0 to 1. Divide them by its width and height.')
            else:
                things.append(_thing(values, size, classes, keypoints))
                if len(values) == 6:
                    left.add('box with a sixth number, as predictions have it: that is not read',
                             where)
    return things


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thing(values: list[float], size: tuple[int, int], classes: list[str], keypoints: int
           ) -> Thing:
    label, (width, height) = classes[int(values[0])], size
    count = len(values) - 1
    if count < 6 or count % 2 or keypoints and count == 4 + keypoints:
        x, y, w, h = values[1:5]
        return Thing(label, [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height])
    outline = [value * (height if place % 2 else width) for place, value in enumerate(values[1:])]
    return Thing(label, outline_box([outline]), [outline])
