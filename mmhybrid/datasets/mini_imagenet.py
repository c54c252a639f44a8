"""Mini ImageNet: generated pictures of one object each, one folder per class.

    train/<class>/0000.jpg ...
    val/<class>/0000.jpg ...

The classes are the categories of mini COCO: told apart by outline or texture, never by colour.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from . import drawing
from .mini_coco import KINDS
from .photographs import PHOTOGRAPHS, load_photographs
from .storage import Progress, atomic_folder, existing_recipe, needs_writing
from .verify import Report

# Raise it whenever the same arguments give other pixels.
VERSION = 1
TRAIN, VAL = 800, 200

SIDE = 64
HALF_RANGE = (14.0, 26.0)
_SPLIT_SEED = {'train': 2, 'val': 3}  # other scenes than mini COCO's


def make_picture(index: int, split: str, photographs: dict[str, np.ndarray],
                 seed: int = 0) -> tuple[np.ndarray, str]:
    """Draw one picture; depends on the arguments only.

    Args:
        index: Number of the picture in its split, from 0; classes take turns.
        split: 'train' or 'val'.
        photographs: Result of `load_photographs(split)`.
        seed: Seed of the whole set.

    Returns:
        Picture (SIDE, SIDE, 3) uint8 and the name of its class.
    """
    rng = np.random.RandomState([seed, _SPLIT_SEED[split], index])
    kind = index % len(KINDS)
    names = PHOTOGRAPHS[split]
    size = (SIDE, SIDE)
    canvas = drawing.background(photographs[names[rng.randint(len(names))]], size, rng)
    placed = drawing.place_objects(rng, KINDS, [kind], size, HALF_RANGE, tries=100)
    assert placed, f'nothing placed in picture {index} of {split}'
    drawing.paint(canvas, placed[0], rng)
    return canvas, KINDS[kind].name


def write_mini_imagenet(folder: str | Path, train: int = TRAIN, val: int = VAL, seed: int = 0,
                        force: bool = False, progress: Progress | None = None) -> bool:
    """Generate the whole set.

    Args:
        folder: Becomes what `data/imagenet` is for the real set.
        train: Number of training images, of all classes together.
        val: Number of validation images.
        seed: Another seed gives other images.
        force: Replace a generated set that is there.
        progress: Called as progress(done, total) after each image.

    Returns:
        True when the set was written, False when the same one was already there.

    Raises:
        ValueError: Too few images for every class to have one.
        FileExistsError: See `storage.needs_writing`.
    """
    folder = Path(folder)
    counts = {'train': train, 'val': val}
    for split, count in counts.items():
        if count < len(KINDS):
            raise ValueError(f'--{split} is {count}; expected at least {len(KINDS)} images, one '
                             'of each class.')
    recipe = {'kind': 'mini-imagenet', 'version': VERSION, 'seed': seed, **counts}
    if not needs_writing(folder, recipe, force):
        return False
    done = 0
    with atomic_folder(folder, recipe) as work:
        for split, count in counts.items():
            photographs = load_photographs(split)
            for index in range(count):
                pixels, name = make_picture(index, split, photographs, seed)
                path = work / split / name / f'{index:04d}.jpg'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, quality=92)
                done += 1
                if progress is not None:
                    progress(done, train + val)
    return True


def verify_mini_imagenet(folder: str | Path) -> Report:
    """Count the images of a generated set; none is opened."""
    folder, report = Path(folder), Report()
    recipe = existing_recipe(folder) or {}
    for split in _SPLIT_SEED:
        there = sum(1 for _ in (folder / split).glob('*/*.jpg'))
        if there == recipe.get(split):
            report.facts.append(f'{split}: {there} images')
        else:
            report.problems.append(
                f'{folder / split} has {there} images, expected {recipe.get(split)}. Generate the '
                'set again: tools/prepare_data.py with --force')
    return report
