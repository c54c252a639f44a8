"""Mini COCO: generated instance segmentation data in the layout and schema of COCO 2017.

    annotations/instances_train2017.json   train2017/000000000001.jpg ...
    annotations/instances_val2017.json     val2017/000000200001.jpg ...

Five categories, told apart by outline or texture and never by colour. Groups of small objects are
annotated as one crowd with run lengths, everything else with polygons.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import drawing
from .categories import COCO_CATEGORIES, COCO_IDS
from .drawing import Kind
from .masks import bounding_box, mask_to_polygons, mask_to_rle
from .photographs import PHOTOGRAPHS, load_photographs
from .storage import Progress, atomic_folder, needs_writing

# Raise it whenever the same arguments give other pixels or annotations.
VERSION = 1
TRAIN, VAL = 480, 64

KINDS = [
    Kind('frisbee', drawing.disc, drawing.rings_pattern),
    Kind('zebra', drawing.disc, drawing.stripes_pattern),
    Kind('donut', drawing.ring, drawing.dots_pattern),
    Kind('kite', drawing.diamond, drawing.quarters_pattern, scale=1.2),
    Kind('pizza', drawing.triangle, drawing.dots_pattern, scale=1.15),
]

# H, W in pixels.
SIZES = ((120, 160), (160, 120), (144, 160), (160, 160))
HALF_RANGE = (13.0, 36.0)
CROWD_EVERY = 12
FIRST_IMAGE_ID = {'train': 1, 'val': 200001}
_SPLIT_SEED = {'train': 0, 'val': 1}
_DATE = '2017-11-15 00:00:00'


def make_scene(index: int, split: str, photographs: dict[str, np.ndarray],
               seed: int = 0) -> tuple[np.ndarray, list[dict], str]:
    """Draw one image with its annotations; depends on the arguments only.

    Args:
        index: Number of the image in its split, from 0.
        split: 'train' or 'val'.
        photographs: Result of `load_photographs(split)`.
        seed: Seed of the whole set.

    Returns:
        Image (H, W, 3) uint8; annotations without ids, each with segmentation, area, bbox, iscrowd,
        category_id; name of the photograph.
    """
    rng = np.random.RandomState([seed, _SPLIT_SEED[split], index])
    name = PHOTOGRAPHS[split][index % len(PHOTOGRAPHS[split])]
    size = SIZES[rng.randint(len(SIZES))]
    canvas = drawing.background(photographs[name], size, rng)

    crowd = index % CROWD_EVERY == CROWD_EVERY - 1
    group = []
    if crowd:  # many small ones of a kind, at the back
        kind = rng.randint(len(KINDS))
        group = drawing.place_objects(rng, KINDS, [kind] * 8, size, (6.0, 9.0), min_visible=0.6)
    wanted = rng.randint(len(KINDS), size=rng.randint(1, 3 if crowd else 6)).tolist()
    placed = drawing.place_objects(rng, KINDS, wanted, size, HALF_RANGE, already=group)
    for item in placed:
        drawing.paint(canvas, item, rng)

    masks = drawing.visible_masks(placed, size)
    annotations = []
    for item, mask in zip(placed[len(group):], masks[len(group):], strict=True):
        annotations.append(_annotation(mask, KINDS[item.kind].name, crowd=False))
    if group:
        union = np.logical_or.reduce(masks[:len(group)])
        annotations.append(_annotation(union, KINDS[group[0].kind].name, crowd=True))
    return canvas, annotations, name


def _annotation(mask: np.ndarray, category: str, crowd: bool) -> dict:
    return {
        'segmentation': mask_to_rle(mask) if crowd else mask_to_polygons(mask),
        'area': float(mask.sum()),
        'iscrowd': int(crowd),
        'bbox': bounding_box(mask),
        'category_id': COCO_IDS[category],
    }


def write_mini_coco(folder: str | Path, train: int = TRAIN, val: int = VAL, seed: int = 0,
                    force: bool = False, progress: Progress | None = None) -> bool:
    """Generate the whole set.

    Args:
        folder: Becomes what `data/coco` is for the real set.
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
    recipe = {'kind': 'mini-coco', 'version': VERSION, 'seed': seed, **counts}
    if not needs_writing(folder, recipe, force):
        return False
    done = 0
    with atomic_folder(folder, recipe) as work:
        (work / 'annotations').mkdir()
        for split, count in counts.items():
            photographs = load_photographs(split)
            images, annotations = [], []
            (work / f'{split}2017').mkdir()
            for index in range(count):
                pixels, found, name = make_scene(index, split, photographs, seed)
                image_id = FIRST_IMAGE_ID[split] + index
                file_name = f'{image_id:012d}.jpg'
                Image.fromarray(pixels).save(work / f'{split}2017' / file_name, quality=92)
                images.append(_image_record(image_id, file_name, pixels.shape, split, name))
                for number, annotation in enumerate(found):
                    # COCO's crowds have their own range of ids, too.
                    base = 900000000000 if annotation['iscrowd'] else 0
                    annotations.append({**annotation, 'image_id': image_id,
                                        'id': base + image_id * 100 + number})
                done += 1
                if progress is not None:
                    progress(done, train + val)
            document = {'info': _info(seed), 'licenses': _LICENSES, 'images': images,
                        'annotations': annotations, 'categories': COCO_CATEGORIES}
            path = work / 'annotations' / f'instances_{split}2017.json'
            path.write_text(json.dumps(document, separators=(',', ':')))
    return True


_LICENSES = [{
    'url': 'https://creativecommons.org/publicdomain/zero/1.0/',
    'id': 1,
    'name': 'Generated objects on photographs distributed with scikit-image',
}]


def _info(seed: int) -> dict:
    return {
        'description': f'mini COCO, generated with seed {seed}',
        'url': '',
        'version': str(VERSION),
        'year': 2017,
        'contributor': 'mmhybrid',
        'date_created': _DATE,
    }


def _image_record(image_id: int, file_name: str, shape: tuple[int, ...], split: str,
                  photograph: str) -> dict:
    return {
        'license': 1,
        'file_name': file_name,
        'coco_url': '',
        'height': int(shape[0]),
        'width': int(shape[1]),
        'date_captured': _DATE,
        # Where the real set names the source of the picture, ours names the photograph.
        'flickr_url': f'skimage/data/{photograph}',
        'id': image_id,
    }
