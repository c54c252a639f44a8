"""Mini ADE20K: generated scene parsing data in the layout of ADEChallengeData2016.

    images/training/ADE_train_00000001.jpg      annotations/training/ADE_train_00000001.png
    images/validation/ADE_val_00000001.jpg      annotations/validation/ADE_val_00000001.png
    objectInfo150.txt                           sceneCategories.txt

Annotations are 8-bit PNGs: 1 to 150 are classes, 0 is "other" and does not count in training or
evaluation once the labels are reduced by one. Eleven classes occur, told apart by outline or
texture and never by colour.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from . import drawing
from .categories import ADE20K_LABELS, ADE20K_NAMES
from .drawing import Kind
from .photographs import PHOTOGRAPHS, load_photographs
from .storage import Progress, atomic_folder, needs_writing

# Raise it whenever the same arguments give other pixels or labels.
VERSION = 1
TRAIN, VAL = 800, 64

# The photograph is the wall, and a chessboard below it the floor.
OTHER = 'other'
KINDS = [
    Kind('windowpane', drawing.rectangle, drawing.panes_pattern, aspect=(0.8, 1.5), tilt=4),
    Kind('painting', drawing.rectangle, drawing.frame_pattern, tilt=6),
    Kind('blind', drawing.rectangle, drawing.slats_pattern, aspect=(0.9, 1.4), tilt=4),
    Kind('column', drawing.rectangle, drawing.stripes_pattern, aspect=(1.8, 2.6), tilt=4),
    Kind('rug', drawing.disc, drawing.checks_pattern, aspect=(0.5, 0.7)),
    Kind('ball', drawing.disc, drawing.dots_pattern),
    Kind('plate', drawing.disc, drawing.rings_pattern),
    Kind('clock', drawing.disc, drawing.hands_pattern, tilt=30),
    Kind('flag', drawing.pennant, drawing.quarters_pattern, aspect=(0.6, 0.9)),
    Kind(OTHER, drawing.blob, drawing.plain_pattern),
]
CLASSES = ('wall', 'floor', *(kind.name for kind in KINDS if kind.name != OTHER))

# H, W in pixels.
SIZES = ((96, 128), (128, 96), (112, 112))
HALF_RANGE = (14.0, 32.0)
FOLDERS = {'train': 'training', 'val': 'validation'}
_SPLIT_SEED = {'train': 2, 'val': 3}


def make_scene(index: int, split: str, photographs: dict[str, np.ndarray],
               seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Draw one image with its label map; depends on the arguments only.

    Args:
        index: Number of the image in its split, from 0.
        split: 'train' or 'val'.
        photographs: Result of `load_photographs(split)`.
        seed: Seed of the whole set.

    Returns:
        Image (H, W, 3) uint8; labels (H, W) uint8, 0 other, 1 to 150 the classes; name of the
        photograph.
    """
    rng = np.random.RandomState([seed, _SPLIT_SEED[split], index])
    name = PHOTOGRAPHS[split][index % len(PHOTOGRAPHS[split])]
    size = SIZES[rng.randint(len(SIZES))]
    canvas = drawing.background(photographs[name], size, rng)
    labels = np.full(size, ADE20K_LABELS['wall'], dtype=np.uint8)
    _lay_floor(canvas, labels, rng)

    wanted = rng.randint(len(KINDS), size=rng.randint(2, 5)).tolist()
    placed = drawing.place_objects(rng, KINDS, wanted, size, HALF_RANGE)
    for item in placed:
        drawing.paint(canvas, item, rng)
    for item, mask in zip(placed, drawing.visible_masks(placed, size), strict=True):
        labels[mask] = ADE20K_LABELS.get(KINDS[item.kind].name, 0)
    return canvas, labels, name


def _lay_floor(canvas: np.ndarray, labels: np.ndarray, rng: np.random.RandomState) -> None:
    """Cover the lower 20 to 35 % with square tiles in two colours, in place."""
    H, W = labels.shape
    top = H - H * rng.randint(20, 36) // 100
    half_height, half_width = (H - top) / 2, W / 2
    tile = rng.randint(8, 15)
    floor = Kind('floor', drawing.rectangle,
                 lambda u, v: drawing.checks_pattern(u * half_width / tile, v * half_height / tile))
    placed = drawing.rasterize(floor, 0, (half_width, top + half_height),
                               (half_width, half_height), 0.0, (H, W))
    drawing.paint(canvas, placed, rng)
    labels[placed.window()][placed.inside()] = ADE20K_LABELS['floor']


def write_mini_ade20k(folder: str | Path, train: int = TRAIN, val: int = VAL, seed: int = 0,
                      force: bool = False, progress: Progress | None = None) -> bool:
    """Generate the whole set.

    Args:
        folder: Becomes what `ADEChallengeData2016` is for the real set.
        train: Number of training images.
        val: Number of validation images.
        seed: Another seed gives other images.
        force: Replace a generated set that is there.
        progress: Called as progress(done, total) after each image.

    Returns:
        True when the set was written, False when the same one was already there.

    Raises:
        ValueError: A count below 1.
        FileExistsError: See `storage.needs_writing`.
    """
    folder = Path(folder)
    counts = {'train': train, 'val': val}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f'--{split} is {count}; expected at least 1 image.')
    recipe = {'kind': 'mini-ade20k', 'version': VERSION, 'seed': seed, **counts}
    if not needs_writing(folder, recipe, force):
        return False
    done = 0
    pixels = np.zeros(151, dtype=np.int64)
    images_with = {split: np.zeros(151, dtype=np.int64) for split in counts}
    scenes = []
    with atomic_folder(folder, recipe) as work:
        for split, count in counts.items():
            photographs = load_photographs(split)
            images = work / 'images' / FOLDERS[split]
            annotations = work / 'annotations' / FOLDERS[split]
            images.mkdir(parents=True)
            annotations.mkdir(parents=True)
            for index in range(count):
                image, labels, name = make_scene(index, split, photographs, seed)
                stem = f'ADE_{split}_{index + 1:08d}'
                Image.fromarray(image).save(images / f'{stem}.jpg', quality=92)
                Image.fromarray(labels).save(annotations / f'{stem}.png')
                scenes.append(f'{stem} {Path(name).stem}')
                histogram = np.bincount(labels.ravel(), minlength=151)
                pixels += histogram
                images_with[split] += histogram > 0
                done += 1
                if progress is not None:
                    progress(done, train + val)
        (work / 'sceneCategories.txt').write_text('\n'.join(scenes) + '\n')
        rows = ['Idx\tRatio\tTrain\tVal\tName']
        for label, name in enumerate(ADE20K_NAMES, start=1):
            ratio = pixels[label] / pixels.sum()
            occurs = [images_with[split][label] for split in counts]
            rows.append('\t'.join(map(str, (label, f'{ratio:.4f}', *occurs, name))))
        (work / 'objectInfo150.txt').write_text('\n'.join(rows) + '\n')
    return True
