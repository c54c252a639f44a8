"""From an export to what a training reads: the task, clean annotations, the split, the files."""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..coco_records import coco_records
from ..label_images import IGNORED
from .common import Export, ExportError, Left, Picture, Questions, Thing
from .label_pictures import numbered
from .splitting import Splits, same_pictures, split_pictures

__all__ = ['Prepared', 'label_image', 'prepare', 'thing_mask', 'write']

TASKS = ('detect', 'instance', 'semantic')
_SMALL = 4  # pixels; a side below it is worth a look
_FEW = 5  # objects of a class
_SAME = 0.95  # IoU of two boxes of one class in one picture


@dataclass
class Prepared:
    """What is written.

    Attributes:
        export: where it comes from; its classes are those of the training.
        task: 'detect', 'instance' or 'semantic'.
        splits: pictures for training, validation and perhaps testing.
        suspicious: sentences on annotations that are kept, but worth a look.
        background: whether class 0 of a semantic task is what no object covers.
    """

    export: Export
    task: str
    splits: Splits
    suspicious: list[str] = field(default_factory=list)
    background: bool = False

    @property
    def classes(self) -> list[str]:
        """Names by class number."""
        return ['background'] * self.background + self.export.classes


def prepare(export: Export, questions: Questions, task: str | None, fraction: float, seed: int
            ) -> Prepared:
    """Decide on the task, clean the annotations and split the pictures.

    Raises:
        ExportError: if the task does not fit, or nothing is left.
    """
    task = _task(export, questions, task)
    _check_names(export)
    suspicious = _clean(export)
    background = task == 'semantic' and export.form != 'masks'
    things = [thing for one in export.pictures for thing in one.things]
    if export.form != 'masks' and not things:
        raise ExportError(f'{export.root} has no annotated object that can be used. '
                          + '; '.join(export.notes) + '.')
    if task == 'instance':
        _rectangles(export, things)
    copies = same_pictures(export)
    suspicious += [f'{len(names)} pictures are the same file: {", ".join(names[:4])}'
                   for names in copies]
    splits = split_pictures(export, _held(export), copies, questions, fraction, seed)
    suspicious += _leaks(splits, copies)
    return Prepared(export, task, splits, suspicious, background)


def _task(export: Export, questions: Questions, task: str | None) -> str:
    things = [thing for one in export.pictures for thing in one.things]
    outlined = [thing for thing in things if thing.outlines]
    if export.form == 'masks':
        if task not in (None, 'semantic'):
            raise ExportError(f'--task {task}: label images tell the class of each pixel, and no '
                              'objects. Use --task semantic, or export outlines or boxes.')
        return 'semantic'
    if task in ('instance', 'semantic') and not outlined:
        raise ExportError(f'--task {task}: {export.root} has boxes only, and no outlines. Use '
                          '--task detect.')
    if task is not None:
        return task
    if not outlined:
        return 'detect'
    if len(outlined) < len(things):
        return questions.choose(
            'task', f'{len(outlined)} of {len(things)} objects have an outline, the others only a '
            'box. "instance" takes such a box for the outline, "detect" trains boxes alone.',
            TASKS[:2], 'detect')
    corners = all(isinstance(thing.outlines, list) and len(thing.outlines) == 1
                  and len(thing.outlines[0]) == 8 for thing in things)
    if corners and len(things) > 1:
        return questions.choose(
            'task', f'All {len(things)} outlines have four corners, as turned boxes do. "instance" '
            'takes them for masks, "detect" trains the upright boxes around them.', TASKS[:2],
            'detect')
    return 'instance'


def _check_names(export: Export) -> None:
    for name, count in Counter(export.classes).items():
        if count > 1 or not name:
            raise ExportError(f'{export.root}: the class {name!r} is listed {count} times; '
                              'expected different names that are not empty.')
    if not export.classes:
        raise ExportError(f'{export.root} names no classes.')


def _clean(export: Export) -> list[str]:
    """Cut what reaches out of its picture, leave out what has no area; say what looks wrong."""
    left, odd = Left(), Left()
    faulty = _faulty_outlines(export)
    for one in export.pictures:
        kept = []
        for thing in one.things:
            if id(thing) in faulty:
                left.add(f'{thing.label} whose outline cannot be used ({faulty[id(thing)]}): left '
                         'out', one.name)
                continue
            if not _cut(thing, one.size, odd, one.name):
                left.add(f'{thing.label} whose box has no area inside its picture: left out',
                         one.name)
                continue
            kept.append(thing)
            if min(thing.box[2:]) < _SMALL:
                odd.add(f'objects with a side of less than {_SMALL} pixels', one.name)
        one.things = kept
        if _doubled(kept):
            odd.add('pictures with two nearly equal boxes of one class', one.name)
    export.notes += left.notes()
    return odd.notes() + _odd_classes(export)


def _faulty_outlines(export: Export) -> dict[int, str]:
    """id() of objects whose outlines COCO's tools would refuse, or crash on -> why."""
    things = [(place, one, thing) for place, one in enumerate(export.pictures)
              for thing in one.things if thing.outlines]
    records, problems = coco_records(dict(
        images=[dict(id=place, file_name=one.name, width=one.size[0], height=one.size[1])
                for place, one in enumerate(export.pictures)],
        categories=[dict(id=0, name='any')],
        annotations=[dict(id=number, image_id=place, category_id=0, bbox=[0, 0, 1, 1], area=1,
                          iscrowd=0, segmentation=thing.outlines)
                     for number, (place, one, thing) in enumerate(things)]))
    assert not problems, problems
    return {id(things[number][2]): why for number, why in records.faults.items()}


def _cut(thing: Thing, size: tuple[int, int], odd: Left, where: str) -> bool:
    """Cut an object at the edges of its picture; whether something is left."""
    x, y, w, h = map(float, thing.box)
    if not np.isfinite([x, y, w, h]).all() or w <= 0 or h <= 0:
        return False
    x0, y0 = max(x, 0.0), max(y, 0.0)
    x1, y1 = min(x + w, float(size[0])), min(y + h, float(size[1]))
    if x1 - x0 < 1 or y1 - y0 < 1:
        return False
    if (x1 - x0) * (y1 - y0) < 0.9 * w * h:
        odd.add('objects that reach out of their picture by more than a tenth: cut', where)
    thing.box = [round(side, 2) for side in (x0, y0, x1 - x0, y1 - y0)]
    if isinstance(thing.outlines, list):
        thing.outlines = [[round(min(max(value, 0), size[place % 2]), 2)
                           for place, value in enumerate(outline)] for outline in thing.outlines]
    return True


def _doubled(things: list[Thing]) -> bool:
    for label in {thing.label for thing in things}:
        boxes = np.array([thing.box for thing in things if thing.label == label])
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        ends = boxes[:, :2] + boxes[:, 2:]
        high = np.minimum(ends[:, None], ends[None])
        both = np.clip(high - low, 0, None).prod(-1)
        area = boxes[:, 2:].prod(-1)
        iou = both / (area[:, None] + area[None] - both)
        if (iou[np.triu_indices(len(boxes), 1)] > _SAME).any():
            return True
    return False


def _odd_classes(export: Export) -> list[str]:
    found = []
    alike: dict[str, list[str]] = {}
    for name in export.classes:
        alike.setdefault(''.join(filter(str.isalnum, name.casefold())), []).append(name)
    found += [f'the classes {", ".join(names)} differ only in case, blanks or signs: one class?'
              for key, names in alike.items() if key and len(names) > 1]
    if export.form != 'masks':
        counts = Counter(thing.label for one in export.pictures for thing in one.things)
        few = [f'{name} ({counts[name]})' for name in export.classes if counts[name] < _FEW]
        if few:
            found.append(f'classes with fewer than {_FEW} objects: {", ".join(few)}')
        empty = sum(not one.things for one in export.pictures)
        if empty:
            found.append(f'{empty} of {len(export.pictures)} pictures have no object: is '
                         'everything annotated?')
    return found


def _rectangles(export: Export, things: list[Thing]) -> None:
    bare = [thing for thing in things if not thing.outlines]
    for thing in bare:
        x, y, w, h = thing.box
        thing.outlines = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if bare:
        export.notes.append(f'{len(bare)} x box without an outline: its rectangle is the outline')


def _held(export: Export) -> dict[str, set[str]]:
    """Classes that each picture holds."""
    if export.form != 'masks':
        return {one.name: {thing.label for thing in one.things} for one in export.pictures}
    return {one.name: {export.classes[export.numbers[value]] for value in one.pixels
                       if export.numbers[value] != IGNORED} for one in export.pictures}


def _leaks(splits: Splits, copies: list[list[str]]) -> list[str]:
    where = {one.name: split for split, found in splits.items() for one in found}
    return [f'{names[0]} is in {" and ".join(sorted({where[name] for name in names}))}: scores '
            'count what was learned by heart' for names in copies
            if len({where[name] for name in names if name in where}) > 1]


# --- files ----------------------------------------------------------------------------------------

def write(prepared: Prepared, folder: Path, progress: Callable[[int, int], None] | None = None
          ) -> None:
    """Write annotation files (``train.json``) or label images with lists (``train.txt``).

    Args:
        prepared: what to write.
        folder: where to; it exists.
        progress: called with the number of label images done and of all.
    """
    if prepared.task != 'semantic':
        for split, pictures in prepared.splits.items():
            text = json.dumps(_coco(prepared, pictures), separators=(',', ':'), ensure_ascii=False)
            (folder / f'{split}.json').write_text(text, encoding='utf-8')
        return
    total, done = sum(map(len, prepared.splits.values())), 0
    for split, pictures in prepared.splits.items():
        for one in pictures:
            # The whole name of the image, so that images of several suffixes stay apart.
            path = folder / 'labels' / f'{one.name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label_image(prepared, one)).save(path)
            done += 1
            if progress is not None:
                progress(done, total)
        (folder / f'{split}.txt').write_text(''.join(f'{one.name}\n' for one in pictures),
                                             encoding='utf-8')


def _coco(prepared: Prepared, pictures: list[Picture]) -> dict:
    numbers = {name: number for number, name in enumerate(prepared.classes, 1)}
    images, annotations = [], []
    for image_id, one in enumerate(pictures, 1):
        images.append(dict(id=image_id, file_name=one.name, width=one.size[0], height=one.size[1]))
        for thing in one.things:
            entry = dict(id=len(annotations) + 1, image_id=image_id,
                         category_id=numbers[thing.label], bbox=thing.box, area=_area(thing),
                         iscrowd=int(thing.crowd))
            if thing.outlines and prepared.task == 'instance':
                entry['segmentation'] = thing.outlines
            annotations.append(entry)
    return dict(info=dict(description=f'Converted from {prepared.export.form} by mmhybrid init'),
                images=images, annotations=annotations,
                categories=[dict(id=number, name=name) for name, number in numbers.items()])


def _area(thing: Thing) -> float:
    if isinstance(thing.outlines, list):
        return round(max(sum(map(_polygon_area, thing.outlines)), 1.0), 2)
    if isinstance(thing.outlines, dict) and isinstance(thing.outlines['counts'], list):
        return float(sum(thing.outlines['counts'][1::2]))
    return round(thing.box[2] * thing.box[3], 2)


def _polygon_area(outline: list[float]) -> float:
    x, y = np.array(outline[0::2]), np.array(outline[1::2])
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def label_image(prepared: Prepared, one: Picture) -> np.ndarray:
    """(H, W) uint8 class numbers; objects are drawn over the background, the smallest last."""
    if prepared.export.form == 'masks':
        return numbered(os.path.join(prepared.export.root, one.labels), prepared.export.numbers)
    labels = np.zeros(one.size[::-1], np.uint8)
    for thing in sorted(one.things, key=_area, reverse=True):
        number = IGNORED if thing.crowd else prepared.classes.index(thing.label)
        labels[thing_mask(thing, one.size)] = number
    return labels


def thing_mask(thing: Thing, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: where an object is; its box, if it has no outline."""
    from pycocotools import mask as coder

    width, height = size
    if isinstance(thing.outlines, dict):
        code = thing.outlines
        if isinstance(code['counts'], list):
            code = coder.frPyObjects(code, height, width)
        return coder.decode(code).astype(bool)
    x, y, w, h = thing.box
    outlines = thing.outlines or [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return coder.decode(coder.merge(coder.frPyObjects(outlines, height, width))).astype(bool)
