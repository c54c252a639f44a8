"""What is wrong with annotations of one's own: COCO-format files, and folders of label images.

mmdet and mmseg fail on these deep in a worker process, hours later, or not at all: CocoDataset
leaves out what it cannot use, and numbers classes by their order in the file, not in the config.

Functions return sentences for the user, problems apart from mere notes.
"""
from __future__ import annotations

import difflib
import os
import os.path as osp
from collections import Counter

import numpy as np
from PIL import Image

__all__ = ['check_coco', 'check_label_folder', 'label_problem']

SAMPLES = 1000  # image files looked for; on a network disk all of them can take minutes
LABELS = 24  # label images opened
IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')
IGNORED = 255


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


def check_label_folder(images: str, labels: str, image_suffix: str, label_suffix: str,
                       classes: int, ignored: int = IGNORED,
                       zero: bool = False) -> tuple[list[str], list[str]]:
    """Check two folders as mmseg's BaseSegDataset pairs them, and some of the label images.

    Args:
        images: folder of images, with folders below it or not.
        labels: folder of label images with the same names.
        image_suffix: end of an image's name, ".jpg".
        label_suffix: what stands in its place in the label image's name, ".png".
        classes: how many.
        ignored: the label that means "ignore".
        zero: reduce_zero_label.

    Returns:
        Problems, and notes.
    """
    names = sorted(_below(images))
    stems = [name[:-len(image_suffix)] for name in names if name.endswith(image_suffix)]
    if not stems:
        ends = Counter(osp.splitext(name)[1] for name in names).most_common(3)
        there = ', '.join(f'{count} x {end or "no suffix"}' for end, count in ends) or 'no files'
        return [f'{images} has no images that end with {image_suffix!r}; it holds {there}. Set '
                'img_suffix of the data set'], []
    have = set(_below(labels))
    alone = [stem for stem in stems if stem + label_suffix not in have]
    if alone:
        example = osp.join(labels, alone[0] + label_suffix)
        return [f'{len(alone)} of {len(stems)} images in {images} have no label image, for example '
                f'{example} does not exist. Add them, remove the images, or set seg_map_suffix'], []
    seen = Counter()
    for stem in _spread(stems, LABELS):
        path = osp.join(labels, stem + label_suffix)
        try:
            with Image.open(osp.join(images, stem + image_suffix)) as image:
                size = image.size
                if image.getexif().get(0x112, 1) > 4:  # lies on its side, and is loaded upright
                    size = size[::-1]
            with Image.open(path) as image:
                values = np.asarray(image)
        except (OSError, ValueError, SyntaxError):
            continue  # reading the data names the file
        problem = label_problem(values, size[::-1], path, classes, ignored, zero)
        if problem:
            return [problem], []
        seen.update(np.unique(values).tolist())
    used = set(seen) - {ignored} - ({0} if zero else set())
    if ignored in seen and len(used) < min(classes, 2):
        return [], [f'In {min(len(stems), LABELS)} label images of {labels} there is only '
                    f'{", ".join(map(str, sorted(used))) or "nothing"} beside {ignored}, which '
                    'means "ignore". If it is a class there, give it its number (0 to '
                    f'{classes - 1}) in the files']
    return [], []


def label_problem(labels: np.ndarray, shape: tuple, path: str, classes: int | None = None,
                  ignored: int = IGNORED, zero: bool = False) -> str | None:
    """Sentence on a label image that does not fit, or None.

    Args:
        labels: as in the file.
        shape: (height, width) of the image.
        path: the file.
        classes: how many; None does not look at the values.
        ignored: the label that means "ignore".
        zero: reduce_zero_label.
    """
    if labels.ndim != 2:
        return (f'{path} is a colour picture (shape {labels.shape}); expected one channel that '
                'holds class numbers, as a grey or a palette PNG does. Convert the label images')
    if tuple(labels.shape) != tuple(shape):
        return (f'{path} is {labels.shape[1]} x {labels.shape[0]}, its image {shape[1]} x '
                f'{shape[0]}; both must have the same size. Resize the label images with nearest '
                'neighbour, or correct the pair')
    if classes is None or not labels.size:
        return None
    largest = int(labels.max(where=labels != ignored, initial=0))
    if largest > classes - 1 + zero:
        return (f'{path} has label {largest}, but with {classes} classes and '
                f'reduce_zero_label={zero} labels are {int(zero)} to {classes - 1 + zero}, and '
                f'{ignored} for "ignore". Correct metainfo.classes and num_classes, or the files')
    return None


def _below(folder: str):
    for where, _, names in os.walk(folder, followlinks=True):
        inner = osp.relpath(where, folder)
        yield from (osp.join(inner, name) if inner != '.' else name for name in names)
