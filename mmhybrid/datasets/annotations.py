"""What is wrong with COCO-format files of one's own.

mmdet fails on these deep in a worker process, hours later, or not at all: CocoDataset leaves out
what it cannot use, and numbers classes by their order in the file, not in the config.

Functions return sentences for the user, problems apart from mere notes.
"""
from __future__ import annotations

import os.path as osp
from collections import Counter

import numpy as np

from mmhybrid.spelling import nearest_few

from .coco_file import in_json
from .coco_records import Records, several

__all__ = ['check_coco', 'spread']

SAMPLES = 1000  # image files looked for; on a network disk all of them can take minutes


def check_coco(records: Records, classes: tuple, masks: bool, train: bool, scored: bool = False,
               folder: str | None = None, filter_cfg: dict | None = None,
               indices: int | list | None = None,
               outlines: bool = False) -> tuple[list[str], list[str], str]:
    """Check an instances file as mmdet's CocoDataset reads it.

    Args:
        records: the file.
        classes: names of the classes, as in ``metainfo``.
        masks: whether a pipeline loads masks, or a metric compares them.
        train: whether the file is for training, which needs objects.
        scored: whether a metric reads the file, too.
        folder: where the images are; None does not look for them.
        filter_cfg: of the data set; counts in training.
        indices: of the data set.
        outlines: whether masks are loaded as polygons (poly2mask=False).

    Returns:
        Problems; notes on what is left out for its faults; and a summary of what is used, what is
        left out and why.
    """
    problems, notes = [], []
    if not records.names:
        problems.append('lists no images')
    if train and not len(records.ids):
        problems.append('has no annotations, so there is nothing to learn')
    problems += _categories([name for _, name in records.categories], classes)
    if problems:
        return problems, notes, ''
    wanted = np.array([name in classes for _, name in records.categories])
    # With the -1 of unknown categories as the last place.
    wanted = np.append(wanted, False)[records.category]
    left_out, used = _left_out(records, wanted)
    chosen = _chosen_images(records, wanted, train, filter_cfg or {}, indices)
    objects = used & (chosen[1][records.image] > 0)
    problems += _mask_problems(records, used, wanted, masks, scored)
    if masks and not scored:
        notes += _partly_masked(records, used)
    coded = objects & ~records.crowd & records.coded & (train and outlines)
    if coded.any():
        notes.append(f'{_count(records, coded)} {OUTLINES}: nothing is learned from them')
    if scored:
        problems += _text_ids(records)
        notes += _id_zero(records)
    notes += [f'{_count(records, there)} {reason}: left out'
              for reason, there in left_out.items() if FAULTS[reason] and there.any()]
    if train and len(records.ids) and not problems:
        problems += _nothing_to_learn(records, left_out, objects, coded, chosen)
    if scored and len(records.ids) and not (used & ~records.crowd).any():
        notes.append('has no object of these classes that could be found, so all scores would be '
                     '-1')
    problems += _absent(records, folder)
    notes += _listed_twice(records)
    return problems, notes, _summary(records, left_out, objects, used, chosen)


# Why an annotation is not an object of the data set, in the order in which mmdet asks; True where
# it is a fault of the file rather than a choice.
FAULTS = {'of images that are not listed': True, 'marked "ignore"': False,
          'whose box has no area inside its image': True, 'whose area is not above 0': True,
          'whose category_id is not a listed category': True, 'of other classes': False}
OUTLINES = 'with run lengths, but the pipeline loads polygons (poly2mask=False)'


def _left_out(records: Records, wanted: np.ndarray) -> tuple[dict, np.ndarray]:
    """For each reason the annotations (A) bool that have it first; and those that have none."""
    x, y, w, h = records.boxes.T
    width, height = records.sizes[records.image].T  # any, where it is not an image: left out before
    inside = (np.maximum(0, np.minimum(x + w, width) - np.maximum(x, 0))
              * np.maximum(0, np.minimum(y + h, height) - np.maximum(y, 0)))
    found = (records.image < 0, records.ignored, (inside == 0) | (w < 1) | (h < 1),
             records.areas <= 0, records.category < 0, ~wanted)
    used, reasons = np.ones(len(records.ids), bool), {}
    for reason, there in zip(FAULTS, found, strict=True):
        reasons[reason] = used & there
        used = used & ~there
    return reasons, used


def _chosen_images(records: Records, wanted: np.ndarray, train: bool, filter_cfg: dict,
                   indices) -> tuple[dict, np.ndarray]:
    """For each reason how many images are left out; and how often each image (I) is used."""
    count, reasons = len(records.names), {}
    times = np.ones(count, int)
    if train and filter_cfg.get('filter_empty_gt'):
        times[:] = 0
        times[records.image[wanted & (records.image >= 0)]] = 1
        reasons['without an annotation of these classes (filter_cfg.filter_empty_gt)'] = (
            times == 0).sum()
    if train and filter_cfg.get('min_size'):
        small = (times > 0) & (records.sizes.min(1) < filter_cfg['min_size'])
        times[small] = 0
        reasons[f'smaller than filter_cfg.min_size={filter_cfg["min_size"]}'] = small.sum()
    if indices is not None:
        places = np.flatnonzero(times)
        given = len(places)
        if isinstance(indices, int):
            places = places[:indices] if indices >= 0 else places[indices:]
        else:
            places = places[[i for i in indices if -given <= i < given]]
        times = np.bincount(places, minlength=count)
        reasons['not among the indices of the data set'] = given - (times > 0).sum()
    return reasons, times


def _mask_problems(records: Records, used, wanted, masks: bool, scored: bool) -> list[str]:
    if not masks:
        return []
    # Metrics read the mask of every annotation, whether or not the data set gives it out.
    needed = wanted & (records.image >= 0) if scored else used
    bare = needed & records.unmasked
    problems = []
    if bare.any():
        ignore = '' if scored else ', or mark them "ignore": 1'
        problems.append(
            f'has {_count(records, bare)} without a segmentation (a list of polygons, each a list '
            'of six or more numbers, or a run-length code), but the config trains or scores masks. '
            f'Add them, or remove these annotations{ignore}; for boxes alone docs/own_data.md '
            'has a detector without masks')
    faults = {**records.faults, **(records.partial if scored else {})}
    faulty = [place for place in sorted(faults) if needed[place]]
    if faulty:
        listed = '; '.join(f'id {in_json(records.ids.item(place))} has {faults[place]}'
                           for place in faulty[:3]) + ('; ...' if len(faulty) > 3 else '')
        problems.append(f'has {len(faulty)} annotation{"s" if len(faulty) > 1 else ""} whose '
                        f'segmentation cannot be used: {listed}. Correct or remove them')
    return problems


def _partly_masked(records: Records, used: np.ndarray) -> list[str]:
    partly = [place for place in sorted(records.partial) if used[place]]
    if not partly:
        return []
    return [f'{several("annotation", records.ids[partly].tolist())} with good polygons and with '
            'others that have fewer than six or an odd number of coordinates: the others are left '
            'out of the mask']


def _text_ids(records: Records) -> list[str]:
    text = [number for number in records.ids.tolist() if type(number) is str]
    return [f'has {several("annotation", text)} whose id is text. The metrics of COCO take '
            'numbers only; number them from 1'] if text else []


def _id_zero(records: Records) -> list[str]:
    return ['the annotation with id 0 can never be found, because 0 means "no match" to the '
            'metrics of COCO. Number annotations from 1'] if (records.ids == 0).any() else []


def _nothing_to_learn(records: Records, left_out: dict, objects, coded, chosen) -> list[str]:
    """A problem unless something is left that a detector learns: an object that is not a crowd."""
    if (objects & ~records.crowd & ~coded).any():
        return []
    reasons = [f'{_count(records, there)} {reason}' for reason, there in left_out.items()
               if there.any()]
    reasons += _images_left_out(chosen)
    if coded.any():
        reasons.append(f'{_count(records, coded)} {OUTLINES}')
    crowds = objects & records.crowd
    remedy = ''
    if crowds.any():
        reasons.insert(0, f'{_count(records, crowds)} marked "iscrowd": 1')
        remedy = ('. "iscrowd": 1 stands for a group with a common mask, and detectors learn '
                  'nothing from it; tools such as CVAT write it for whatever was drawn with a '
                  'brush. Set "iscrowd": 0 where it is one object')
    return ['has no annotation that can be used for training: ' + '; '.join(reasons) + remedy]


def _images_left_out(chosen) -> list[str]:
    return [f'{count} image{"s" if count > 1 else ""} {reason}'
            for reason, count in chosen[0].items() if count]


def _listed_twice(records: Records) -> list[str]:
    counts = Counter(records.names)
    twice = [name for name, count in counts.items() if count > 1]
    if not twice:
        return []
    ids = [records.image_ids[place] for place, name in enumerate(records.names) if name == twice[0]]
    return [f'{len(twice)} file name{"s are" if len(twice) > 1 else " is"} listed more than once: '
            f'{twice[0]!r}, for example, by {several("image", ids)}. Each has only the objects of '
            'its own id']


def _summary(records: Records, left_out: dict, objects, used, chosen) -> str:
    times = chosen[1]
    weights = times[records.image] * objects  # an image may be used more than once
    parts = [f'{times.sum()} of {len(times)} images and {weights.sum()} of {len(records.ids)} '
             'annotations are used']
    reasons = _images_left_out(chosen)
    reasons += [f'{there.sum()} annotation{"s" if there.sum() > 1 else ""} {reason}'
                for reason, there in left_out.items() if there.any()]
    inside = (used & ~objects).sum()
    if inside:
        reasons.append(f'{inside} annotation{"s" if inside > 1 else ""} in images that are left '
                       'out')
    if reasons:
        parts.append('left out: ' + ', '.join(reasons))
    crowds = (weights * records.crowd).sum()
    if crowds:
        parts.append(f'{crowds} of the annotations {"are crowds" if crowds > 1 else "is a crowd"}, '
                     'of which nothing is learned')
        single = np.bincount(records.image[objects & ~records.crowd], minlength=len(times))
        groups = np.bincount(records.image[objects & records.crowd], minlength=len(times))
        only = ((single == 0) & (groups > 0)).sum()
        if only:
            parts.append(f'{only} image{"s hold" if only > 1 else " holds"} only crowds')
    if records.without_crowd:
        parts.append(f'{records.without_crowd} without iscrowd count as 0')
    return '; '.join(parts)


def _categories(names: list, classes: tuple) -> list[str]:
    """CocoDataset numbers classes by their order in the file, whatever the order in the config."""
    there = [name for name in names if name in classes]
    if there == list(classes):
        return []
    listed = ', '.join(map(repr, names[:20])) + (', ...' if len(names) > 20 else '')
    remedy = (f'Its categories are {listed}. mmdet numbers classes by their order in the file, so '
              'metainfo.classes must name them in this order, and every file must have them all '
              '(with or without objects)')
    absent = [name for name in classes if name not in names]
    if absent:
        near = nearest_few(str(absent[0]), names, 1)
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


def _count(records: Records, there: np.ndarray) -> str:
    return several('annotation', records.ids[there].tolist())


def _absent(records: Records, folder: str | None) -> list[str]:
    if folder is None:
        return []
    some = spread(list(zip(records.image_ids, records.names, strict=True)), SAMPLES)
    absent = [(number, name) for number, name in some if not osp.isfile(osp.join(folder, name))]
    if not absent:
        return []
    number, name = absent[0]
    return [f'lists images that do not exist ({len(absent)} of {len(some)} looked for), for '
            f'example {osp.join(folder, name)} (image id {in_json(number)}). Compare data_prefix '
            'with file_name: their sum must be the path']


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]
