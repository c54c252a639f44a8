"""What is wrong with label images of one's own: the files of semantic segmentation.

mmseg fails on these deep in a worker process, hours later, or not at all.

Functions return sentences for the user, problems apart from mere notes.
"""
from __future__ import annotations

import os
import os.path as osp
from collections import Counter

import numpy as np
from PIL import Image

__all__ = ['check_label_folder', 'label_problem']

LABELS = 24  # label images opened
IGNORED = 255


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
    for stem in stems[::-(-len(stems) // LABELS)]:
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
