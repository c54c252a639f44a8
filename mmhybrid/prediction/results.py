"""What a model found in one picture, as plain values.

Legend: H, W height and width of the picture as it is looked at, turned upright by its EXIF
orientation; N number of objects.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmhybrid.errors import UserError

from ..visualization import class_colors, draw_instances, draw_regions

__all__ = ['Detection', 'Result', 'Segmentation']


@dataclass(eq=False)
class Detection:
    """Objects of one picture, the surest first.

    Attributes:
        picture: path of the picture, or the array (H, W, 3) RGB that was given.
        size: H and W.
        boxes: (N, 4) float32, left, top, right, bottom in pixels of the picture.
        scores: (N,) float32 between 0 and 1.
        labels: (N,) int64, indices into ``names``.
        names: name of each class that the model knows.
        rles: N masks as COCO's compressed run lengths, or None for a model without masks.
    """

    picture: str | np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    rles: list[dict] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def masks(self) -> np.ndarray | None:
        """All masks, (N, H, W) bool; None for a model without masks.

        Decoded anew each time; many objects in a large picture take much memory.
        """
        if self.rles is None:
            return None
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for place, rle in zip(masks, self.rles, strict=True):
            place[:] = decoded(rle)
        return masks

    def chosen(self, which: Sequence[int] | np.ndarray) -> Detection:
        """Some of the objects.

        Args:
            which: their indices in the wanted order, or N truth values.
        """
        which = np.asarray(which)
        index = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        return dataclasses.replace(
            self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index],
            rles=None if self.rles is None else [self.rles[each] for each in index])

    def plot(self, image: np.ndarray | None = None, enlarge: bool = True) -> Image.Image:
        """Draw boxes, masks, names and scores over the picture.

        Args:
            image: (H, W, 3) uint8 RGB, if the picture is at hand; else it is read again.
            enlarge: make small pictures larger, so that names can be read.
        """
        colors = class_colors(len(self.names))
        return draw_instances(
            pixels_of(self.picture) if image is None else image, self.boxes,
            [self.names[label] for label in self.labels],
            None if self.rles is None else map(decoded, self.rles), self.scores.tolist(),
            colors=[colors[label] for label in self.labels], enlarge=enlarge)

    def to_coco(self, image_id: int = 1) -> list[dict]:
        """Annotations in COCO's format, with scores; what ``COCO.loadRes`` of pycocotools takes.

        Args:
            image_id: of the picture.

        Returns:
            N dictionaries; ``category_id`` is the label plus 1.
        """
        return [annotation(label, image_id, box, None if self.rles is None else self.rles[place],
                           float(score))
                for place, (box, score, label) in enumerate(
                    zip(self.boxes.tolist(), self.scores, self.labels, strict=True))]

    def to_supervision(self):
        """The objects as ``supervision.Detections``.

        Raises:
            ImportError: without that package; the message says how to install it.
        """
        return supervision().Detections(
            xyxy=self.boxes.astype(np.float32), mask=self.masks,
            confidence=self.scores.astype(np.float32), class_id=self.labels.astype(int),
            data={'class_name': np.array([self.names[label] for label in self.labels], dtype=str)})


@dataclass(eq=False)
class Segmentation:
    """The class of every pixel of one picture.

    Attributes:
        picture: path of the picture, or the array (H, W, 3) RGB that was given.
        map: (H, W) uint8 (uint16 for more than 255 classes), indices into ``names``, or ``nothing``
            where a class is that was not asked for.
        names: name of each class that the model knows.
        palette: a colour (red, green, blue) for each class.
    """

    picture: str | np.ndarray
    map: np.ndarray
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        return self.map.shape

    @property
    def nothing(self) -> int:
        """The number in ``map`` that is not a class: 255, or 65535 where that is a class."""
        return int(np.iinfo(self.map.dtype).max)

    @property
    def present(self) -> list[int]:
        """Labels of the classes in the picture."""
        return [int(label) for label in np.unique(self.map) if label != self.nothing]

    def plot(self, image: np.ndarray | None = None, enlarge: bool = True) -> Image.Image:
        """Draw the classes as colours over the picture, with their names.

        Args:
            image: (H, W, 3) uint8 RGB, if the picture is at hand; else it is read again.
            enlarge: make small pictures larger, so that names can be read.
        """
        return draw_regions(pixels_of(self.picture) if image is None else image, self.map,
                            self.names, self.palette, self.nothing, enlarge=enlarge)

    def to_image(self) -> Image.Image:
        """The map as a picture of one channel, as training data are: class numbers from 0.

        Up to 255 classes its palette shows them in colour; more are 16-bit numbers.
        """
        if self.map.dtype != np.uint8:
            return Image.fromarray(self.map)
        image = Image.fromarray(self.map)
        # With all 256 entries: for fewer, Pillow writes numbers of fewer bits, and 255 is lost.
        palette = [value for color in self.palette[:255] for value in color]
        image.putpalette(palette + [0] * (768 - len(palette)))
        return image

    def to_coco(self, image_id: int = 1) -> list[dict]:
        """One annotation in COCO's format for each class in the picture; see Detection."""
        return [annotation(label, image_id, box_of(mask), encoded(mask))
                for label, mask in self._masks()]

    def to_supervision(self):
        """One mask for each class in the picture, as ``supervision.Detections``.

        Raises:
            ImportError: without that package; the message says how to install it.
        """
        found = list(self._masks())
        masks = np.array([mask for _, mask in found], dtype=bool).reshape(-1, *self.size)
        return supervision().Detections(
            xyxy=np.array([box_of(mask) for mask in masks], dtype=np.float32).reshape(-1, 4),
            mask=masks, class_id=np.array([label for label, _ in found], dtype=int),
            data={'class_name': np.array([self.names[label] for label, _ in found], dtype=str)})

    def _masks(self) -> Iterator[tuple[int, np.ndarray]]:
        for label in self.present:
            yield label, self.map == label


Result = Detection | Segmentation


def annotation(label: int, image_id: int, box: Sequence[float], rle: dict | None,
               score: float | None = None) -> dict:
    """One annotation of COCO's format, but for its id.

    Args:
        label: index of the class.
        image_id: of the picture.
        box: left, top, right, bottom.
        rle: compressed run lengths of the mask, if there is one.
        score: how sure the model is.
    """
    left, top, right, bottom = (round(float(side), 3) for side in box)
    width, height = round(right - left, 3), round(bottom - top, 3)
    found = dict(image_id=image_id, category_id=int(label) + 1, bbox=[left, top, width, height],
                 area=round(width * height, 3), iscrowd=0)
    if rle is not None:
        counts = rle['counts']
        found.update(
            area=float(run_lengths().area(rle)), segmentation=dict(
                size=list(rle['size']),
                counts=counts.decode() if isinstance(counts, bytes) else counts))
    if score is not None:
        found['score'] = round(score, 6)
    return found


def encoded(mask: np.ndarray) -> dict:
    """A mask (H, W) bool as COCO's compressed run lengths."""
    return run_lengths().encode(np.asfortranarray(mask, dtype=np.uint8))


def decoded(rle: dict) -> np.ndarray:
    """Compressed run lengths as a mask (H, W) bool."""
    return run_lengths().decode(rle).astype(bool)


def run_lengths():
    """The functions for masks of pycocotools.

    Raises:
        UserError: without that package, which mmdet brings along, but mmseg does not.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("Masks in COCO's format need the package pycocotools, which cannot be "
                        f'imported ({error}); run: pip install pycocotools') from error
    return mask


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def pixels_of(picture: str | np.ndarray) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, upright, as models see it."""
    if isinstance(picture, np.ndarray):
        return picture
    import mmcv
    return mmcv.imread(picture, channel_order='rgb')


def supervision():
    """The package of that name.

    Raises:
        ImportError: without it.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError('to_supervision() needs the package supervision, which cannot be '
                          f'imported ({error}); run: pip install supervision') from error
    return supervision

