"""What is wrong with COCO-format files of one's own.

mmdet fails on these deep in a worker process, hours later, or not at all: CocoDataset leaves out
what it cannot use, and numbers classes by their order in the file, not in the config.

Functions return sentences for the user, problems apart from mere notes.
"""
from __future__ import annotations

import difflib
import os.path as osp
from collections import Counter

import numpy as np

__all__ = ['check_coco']

SAMPLES = 1000  # image files looked for; on a network disk all of them can take minutes
IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')


def check_coco(content: dict, classes: tuple, masks: bool, train: bool,
               folder: str | None = None) -> tuple[list[str], list[str]]:
    """Check an instances file as mmdet's CocoDataset reads it.

    Args:
        content: the file.
        classes: names of the classes, as in ``metainfo``.
        masks: whether a pipeline loads masks.
        train: whether the file is for training, which needs objects.
        folder: where the images are; None does not look for them.

    Returns:
        Problems, and notes on what is left out.
    """
    images, annotations = content.get('images') or [], content.get('annotations') or []
    problems, notes = [], []
    if not images:
        problems.append('lists no images')
    if train and not annotations:
        problems.append('has no annotations, so there is nothing to learn')
    problems += _lacking('images', images, IMAGE_KEYS)
    problems += _lacking('annotations', annotations, ANNOTATION_KEYS)
    problems += _lacking('categories', content['categories'], ('id', 'name'))
    problems += problems or _categories(content['categories'], classes)
    if problems:
        return problems, notes
    problems += _twice('image', images) + _twice('annotation', annotations)
    sizes = {image['id']: (image['width'], image['height']) for image in images}
    wanted = {entry['id'] for entry in content['categories'] if entry['name'] in classes}
    known = {entry['id'] for entry in content['categories']}
    strange, stray, unknown, flat, bare, kept = [], [], [], [], [], set()
    for entry in annotations:
        if not _four_numbers(entry['bbox']):
            strange.append(entry)
        elif entry['image_id'] not in sizes:
            stray.append(entry)
        elif entry['category_id'] not in known:
            unknown.append(entry)
        elif not _inside(entry, *sizes[entry['image_id']]):
            flat.append(entry)
        elif entry['category_id'] in wanted:
            kept.add(entry['image_id'])
            if masks and not _has_mask(entry.get('segmentation')) and not entry.get('ignore'):
                bare.append(entry)
    if strange:
        problems.append(f'has {_count(strange)} whose bbox is not four numbers [x, y, width, '
                        f'height], for example {strange[0]["bbox"]!r}')
    if bare:
        problems.append(
            f'has {_count(bare)} without a segmentation (a list of polygons, each a list of six or '
            'more numbers, or a run-length code), but the config trains or scores masks. Add '
            'them, or remove these annotations, or mark them "ignore": 1; for boxes alone '
            '"Your own data" in the README has a detector without masks')
    for entries, what in ((flat, 'whose box has no area inside its image'),
                          (stray, 'of images that are not listed'),
                          (unknown, 'whose category_id is no listed category')):
        if entries:
            notes.append(f'{_count(entries)} {what}: left out')
    if train and annotations and not kept and not problems:
        problems.append('has no annotation that can be used: ' + '; '.join(notes))
    if train and 0 < len(kept) < len(images):
        notes.append(f'{len(images) - len(kept)} of {len(images)} images have no object: left out '
                     'of training unless filter_cfg.filter_empty_gt=False')
    return problems + _absent([image['file_name'] for image in images], folder), notes


def _lacking(what: str, entries: list, keys: tuple) -> list[str]:
    for key in keys:
        without = [entry for entry in entries if key not in entry]
        if without:
            return [f'has {what} without "{key}" ({len(without)}; the first is '
                    f'{_short(without[0])}). Each needs {", ".join(keys)}']
    return []


def _short(entry: dict) -> str:
    text = str({key: value for key, value in entry.items() if key != 'segmentation'})
    return text if len(text) <= 120 else text[:117] + '...'


def _categories(categories: list, classes: tuple) -> list[str]:
    """CocoDataset numbers classes by their order in the file, whatever the order in the config."""
    names = [entry.get('name') for entry in categories]
    there = [name for name in names if name in classes]
    if there == list(classes):
        return []
    listed = ', '.join(map(repr, names[:20])) + (', ...' if len(names) > 20 else '')
    remedy = (f'Its categories are {listed}. mmdet numbers classes by their order in the file, so '
              'metainfo.classes must name them in this order, and every file must have them all '
              '(with or without objects)')
    absent = [name for name in classes if name not in names]
    if absent:
        near = difflib.get_close_matches(str(absent[0]), map(str, names), n=1)
        hint = f' (did you mean {near[0]!r}?)' if near else ''
        if len(absent) == len(classes):
            return [f'has none of the {len(classes)} classes of the config: its categories are '
                    f'{listed}. Set metainfo=dict(classes=(...)) of the data sets to these, in '
                    'this order, and num_classes of the heads']
        return [f'has no category for {", ".join(map(repr, absent[:5]))}'
                f'{", ..." if len(absent) > 5 else ""}{hint}. {remedy}']
    twice = [name for name, count in Counter(there).items() if count > 1]
    if twice:
        return [f'has more than one category named {twice[0]!r}. Give each class one id']
    return [f'has its categories in another order than metainfo.classes. {remedy}']


def _twice(what: str, entries: list) -> list[str]:
    for number, count in Counter(entry['id'] for entry in entries).items():
        if count > 1:
            return [f'has {what} id {number!r} {count} times. Ids must be unique']
    return []


def _four_numbers(box) -> bool:
    return (isinstance(box, (list, tuple)) and len(box) == 4
            and all(isinstance(value, (int, float)) for value in box))


def _inside(entry: dict, width: float, height: float) -> bool:
    x, y, w, h = entry['bbox']
    return (w >= 1 and h >= 1 and entry['area'] > 0
            and min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0))


def _has_mask(segmentation) -> bool:
    if isinstance(segmentation, dict):
        return 'counts' in segmentation and 'size' in segmentation
    return bool(segmentation) and all(isinstance(part, list) for part in segmentation)


def _count(entries: list) -> str:
    ids = ', '.join(str(entry['id']) for entry in entries[:3])
    more = ', ...' if len(entries) > 3 else ''
    return f'{len(entries)} annotation{"s" if len(entries) > 1 else ""} (id {ids}{more})'


def _absent(names: list[str], folder: str | None) -> list[str]:
    if folder is None or not names:
        return []
    some = _spread(names, SAMPLES)
    absent = [name for name in some if not osp.exists(osp.join(folder, name))]
    if not absent:
        return []
    example = osp.join(folder, absent[0])
    return [f'lists images that do not exist ({len(absent)} of {len(some)} looked for), for '
            f'example {example}. Compare data_prefix with file_name: '
            'their sum must be the path']


def _spread(items: list, count: int) -> list:
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]
