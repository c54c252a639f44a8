"""Check data sets that the user has downloaded, and say what to fetch.

Functions return a report instead of printing; problems are sentences for the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .annotations import spread
from .categories import COCO_CATEGORIES
from .coco_file import AnnotationError
from .coco_records import Records, forget_records, load_records
from .storage import existing_recipe

COCO_COUNTS = {'train2017': 118287, 'val2017': 5000}
ADE20K_COUNTS = {'training': 20210, 'validation': 2000}
_COCO_SITE = 'http://images.cocodataset.org'
_COCO_URLS = {
    'train2017': f'{_COCO_SITE}/zips/train2017.zip (18 GB)',
    'val2017': f'{_COCO_SITE}/zips/val2017.zip (1 GB)',
    'annotations': f'{_COCO_SITE}/annotations/annotations_trainval2017.zip (241 MB)',
}
_ADE20K_URL = 'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (923 MB)'

_GENERATE = 'Generate the set again: tools/prepare_data.py with --force'

# Images opened per folder; opening all of COCO takes the better part of an hour.
SAMPLES = 200
_NAMED = 5

Progress = Callable[[int, int], None]


@dataclass
class Report:
    """What a check found: facts that hold, problems with their remedy."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ', '.join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f'{shown} and {len(names) - _NAMED} more'


def _files(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _open(path: Path) -> np.ndarray:
    """Decode fully, so that a file cut short is noticed."""
    with Image.open(path) as image:
        return np.asarray(image)


def verify_coco(folder: str | Path, counts: dict[str, int] | None = None, samples: int = SAMPLES,
                progress: Progress | None = None) -> Report:
    """Check COCO 2017, or a generated set in its layout.

    Args:
        folder: Has annotations/, train2017/ and val2017/.
        counts: Images expected per split; by default those of the generator's marker file, or of
            the real set.
        samples: Images decoded per split, spread over it; their sizes must agree with the json.
        progress: Called as progress(done, total).

    Returns:
        The report.
    """
    folder, report = Path(folder), Report()
    recipe = existing_recipe(folder) or {}
    urls = _COCO_URLS
    if recipe.get('kind') == 'mini-coco':
        counts = counts or {'train2017': recipe['train'], 'val2017': recipe['val']}
        urls = dict.fromkeys(_COCO_URLS)
    counts = counts or COCO_COUNTS
    _check_coco_layout(folder, counts, urls, report)
    total, done = len(counts) * (samples + 1), 0
    for split, expected in counts.items():
        path = folder / 'annotations' / f'instances_{split}.json'
        records = _read_coco_json(path, urls, report)
        done += 1
        if progress is not None:
            progress(done, total)
        wanted = _check_coco_document(records, path, expected, urls, report)
        if not (folder / split).is_dir():
            continue
        present = _files(folder / split)
        missing = wanted.keys() - present
        if missing:
            report.problems.append(
                f'{folder / split}: {len(missing)} of {len(wanted)} images named in {path.name} '
                f'are missing ({_some(missing)}). {_remedy(urls[split])}.')
        elif wanted:
            report.facts.append(f'{split}: all {len(wanted)} images are there')
        elif len(present) != expected:
            report.problems.append(
                f'{folder / split}: {len(present)} files, expected {expected} images. '
                f'{_remedy(urls[split])}.')
        broken, opened = [], 0
        for name in spread(sorted(wanted.keys() & present), samples):
            broken += _check_coco_image(folder / split / name, wanted[name])
            opened += 1
            if progress is not None:
                progress(done + opened, total)
        done += samples
        if broken:
            report.problems.append(
                f'{folder / split}: {len(broken)} of {opened} sampled images are wrong: '
                f'{_some(broken)}. {_remedy(urls[split])}.')
        elif opened:
            report.facts.append(f'{split}: {opened} sampled images decode at the stated size')
    if progress is not None:
        progress(total, total)
    return report


def _remedy(url: str | None) -> str:
    """What to do about a part that is there but wrong; without an address it was generated."""
    return f'Fetch {url} again and unpack it over what is there' if url else _GENERATE


def _check_coco_layout(folder: Path, splits: Iterable[str], urls: dict[str, str | None],
                       report: Report) -> None:
    missing, needed = [], []
    for split in splits:
        if not (folder / 'annotations' / f'instances_{split}.json').is_file():
            missing.append(f'annotations/instances_{split}.json')
            needed.append(urls['annotations'])
        if not (folder / split).is_dir():
            missing.append(f'{split}/')
            needed.append(urls[split])
    if missing:
        fetch = (f"Fetch {', '.join(dict.fromkeys(needed))} and unpack in {folder}"
                 if all(needed) else _GENERATE)
        report.problems.append(f"{folder} lacks {', '.join(missing)}. {fetch}.")


def _read_coco_json(path: Path, urls: dict[str, str | None], report: Report) -> Records | None:
    if not path.is_file():
        return None
    try:
        records, problems = load_records(str(path))
    except AnnotationError as error:
        records, problems = None, [str(error)]
    else:
        problems = [f'{path} {problem}' for problem in problems]
    forget_records()
    report.problems += [f"{problem}. {_remedy(urls['annotations'])}." for problem in problems]
    return records


def _check_coco_document(records: Records | None, path: Path, expected: int,
                         urls: dict[str, str | None], report: Report) -> dict[str, tuple]:
    """Check what a file lists; returns file name -> (width, height)."""
    if records is None:
        return {}
    count = len(records.names)
    if count != expected:
        report.problems.append(
            f"{path} lists {count} images, expected {expected}. "
            f"{_remedy(urls['annotations'])}.")
    names = dict(records.categories)
    wanted = {category['id']: category['name'] for category in COCO_CATEGORIES}
    if names != wanted:
        different = [f'{number}: {names.get(number)!r} instead of {wanted.get(number)!r}'
                     for number in sorted(names.keys() | wanted.keys(), key=str)
                     if names.get(number) != wanted.get(number)]
        report.problems.append(
            f'{path} does not have the 80 categories of COCO ({_some(different)}). Put a set with '
            'other classes in another folder and state them as `metainfo` in your config.')
    stray = int((records.image < 0).sum())
    if stray:
        report.problems.append(
            f"{path}: {stray} annotations belong to images that are not listed. "
            f"{_remedy(urls['annotations'])}.")
    if records.faults:
        place, fault = next(iter(records.faults.items()))
        report.problems.append(
            f'{path}: {len(records.faults)} annotations have a segmentation that cannot be used; '
            f"id {records.ids.item(place)} has {fault}. {_remedy(urls['annotations'])}.")
    if count == expected and names == wanted and not stray and not records.faults:
        report.facts.append(f'{path.name}: {count} images, {len(records.ids)} annotations, 80 '
                            'categories')
    sizes = records.sizes.astype(int).tolist()
    return dict(zip(records.names, map(tuple, sizes), strict=True))


def _check_coco_image(path: Path, stated: tuple) -> list[str]:
    try:
        shape = _open(path).shape[:2]
    except (OSError, ValueError, SyntaxError) as error:
        return [f'{path.name} (cannot be decoded: {error})']
    if shape[::-1] != stated:
        return [f'{path.name} ({shape[1]}x{shape[0]}, the json says {stated[0]}x{stated[1]})']
    return []


def verify_ade20k(folder: str | Path, counts: dict[str, int] | None = None, samples: int = SAMPLES,
                  progress: Progress | None = None) -> Report:
    """Check the ADE20K scene parsing benchmark, or a generated set in its layout.

    Args:
        folder: Has images/ and annotations/, each with training/ and validation/.
        counts: Images expected per split; by default those of the generator's marker file, or of
            the real set.
        samples: Pairs decoded per split, spread over it; sizes must agree and labels be 0..150.
        progress: Called as progress(done, total).

    Returns:
        The report.
    """
    folder, report = Path(folder), Report()
    recipe = existing_recipe(folder) or {}
    url = _ADE20K_URL
    if recipe.get('kind') == 'mini-ade20k':
        counts = counts or {'training': recipe['train'], 'validation': recipe['val']}
        url = None
    counts = counts or ADE20K_COUNTS
    total, done = len(counts) * samples, 0
    missing: list[str] = []
    for split, expected in counts.items():
        images, labels = folder / 'images' / split, folder / 'annotations' / split
        absent = [f'{path.relative_to(folder)}/' for path in (images, labels) if not path.is_dir()]
        missing += absent
        if absent:
            done += samples
            continue
        stems = {kind: {Path(name).stem for name in _files(where) if name.endswith(suffix)}
                 for kind, where, suffix in (('images', images, '.jpg'),
                                             ('annotations', labels, '.png'))}
        lonely = stems['images'] ^ stems['annotations']
        if lonely:
            report.problems.append(
                f'{folder}: {len(lonely)} {split} images or annotations lack their counterpart '
                f'({_some(lonely)}). {_remedy(url)}.')
        pairs = sorted(stems['images'] & stems['annotations'])
        if len(pairs) != expected:
            report.problems.append(
                f'{folder}: {len(pairs)} {split} pairs of image and annotation, expected '
                f'{expected}. {_remedy(url)}.')
        elif not lonely:
            report.facts.append(f'{split}: all {expected} pairs of image and annotation are there')
        broken, opened = [], 0
        for stem in spread(pairs, samples):
            broken += _check_ade20k_pair(images / f'{stem}.jpg', labels / f'{stem}.png')
            opened += 1
            if progress is not None:
                progress(done + opened, total)
        done += samples
        if broken:
            report.problems.append(
                f'{folder}: {len(broken)} of {opened} sampled {split} pairs are wrong: '
                f'{_some(broken)}. {_remedy(url)}.')
        elif opened:
            report.facts.append(f'{split}: {opened} sampled pairs decode, agree in size, and have '
                                'labels 0 to 150')
    if missing:
        fetch = (f'Fetch {url} and unpack it in {folder.parent}, so that '
                 f'{folder}/images/training/ADE_train_00000001.jpg exists' if url else _GENERATE)
        report.problems.append(f"{folder} lacks {', '.join(missing)}. {fetch}.")
    if progress is not None:
        progress(total, total)
    return report


def _check_ade20k_pair(image: Path, annotation: Path) -> list[str]:
    try:
        shape = _open(image).shape[:2]
        labels = _open(annotation)
    except (OSError, ValueError, SyntaxError) as error:
        return [f'{image.stem} (cannot be decoded: {error})']
    if labels.ndim != 2 or labels.dtype != np.uint8:
        return [f'{annotation.name} (shape {labels.shape}, {labels.dtype}; expected 8-bit grey)']
    if labels.shape != shape:
        return [f'{annotation.name} ({labels.shape[1]}x{labels.shape[0]}, its image is '
                f'{shape[1]}x{shape[0]})']
    if labels.max() > 150:
        return [f'{annotation.name} (label {labels.max()}; expected 0 to 150)']
    return []
