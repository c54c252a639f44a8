"""What predicts, whatever computes it: pictures in, plain results out.

Nothing here or below needs PyTorch: :class:`PicturePredictor` is the common part of
:class:`mmhybrid.prediction.predictor.Predictor` and of :mod:`mmhybrid.prediction.onnx_file`.
"""
from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from mmhybrid.errors import UserError
from mmhybrid.spelling import did_you_mean, nearest_few

from .results import Detection, Result, Segmentation, box_of, encoded
from .tiles import merge_detections, merge_segmentations, tiles_of

__all__ = ['Picture', 'PicturePredictor', 'Wanted', 'rgb']


@dataclass
class Wanted:
    """Which results are asked for, and how pictures are taken.

    Attributes:
        score: lowest score of an object; None is 0.3 for detectors.
        classes: names of the classes that count; None for all.
        tile: longest side of the tiles that larger pictures are cut into; None cuts nothing.
        overlap: least part of a tile that its neighbours show too.
        batch: how many pictures or tiles go through the model at once.
    """

    score: float | None = None
    classes: Sequence[str] | None = None
    tile: int | None = None
    overlap: float = 0.2
    batch: int = 1

    def check(self, predictor: PicturePredictor) -> None:
        """Raise UserError for what cannot be had of a predictor."""
        if self.score is not None and predictor.finds_regions:
            raise UserError('A score threshold is for detectors; a segmentor gives each pixel its '
                            'likeliest class. Leave it out.')
        if self.score is not None and not 0 <= self.score <= 1:
            raise UserError(f'The score threshold is {self.score}; expected 0 to 1.')
        if self.batch < 1:
            raise UserError(f'The batch is {self.batch}; expected at least 1 picture.')
        if self.tile is not None and self.tile < 32:
            raise UserError(f'Tiles of {self.tile} pixels; expected 32 or more.')
        if not 0 <= self.overlap < 1:
            raise UserError(f'The overlap of tiles is {self.overlap}; expected a part of their '
                            'side, from 0 up to below 1.')
        if isinstance(self.classes, str):
            raise UserError(f'classes is the text {self.classes!r}; expected a list of names.')
        for name in self.classes or ():
            if name not in predictor.names:
                near = nearest_few(name, predictor.names)
                more = ', ...' if len(predictor.names) > 10 else ''
                known = f' It knows {", ".join(predictor.names[:10])}{more}.'
                raise UserError(f'The model knows no class {name!r}.'
                                + (did_you_mean(*near) or known))


@dataclass
class Picture:
    """A picture that has been read.

    Attributes:
        source: path, or the array (H, W, 3) RGB that results keep.
        data: as the pipeline's first step leaves it: 'img' and what is known of it.
    """

    source: str | np.ndarray
    data: dict

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.data['img'].shape[:2]

    def rgb(self) -> np.ndarray:
        """The picture as (H, W, 3) uint8 RGB."""
        return rgb(self.data['img'])


class PicturePredictor(ABC):
    """Finds objects or regions in pictures.

    Attributes:
        name: path or address of the weights, for messages.
        names: names of the classes.
        palette: a colour of each class.
        finds_regions: whether it is a segmentor.
        notes: what was chosen or left out when the weights were loaded.
    """

    name: str
    names: tuple[str, ...]
    palette: tuple
    finds_regions: bool
    notes: list[str]

    def predict(self, images, *, score: float | None = None, classes: Sequence[str] | None = None,
                tile: int | None = None, overlap: float = 0.2, batch: int = 1) -> list[Result]:
        """Look at pictures.

        Args:
            images: a path, an array (H, W, 3) RGB, (H, W) or (H, W, 4) of uint8 or uint16, a
                picture of Pillow; or any number of these.
            score: lowest score of an object (detectors), 0.3 by default.
            classes: names of the classes that count; all by default.
            tile: cut larger pictures into tiles of this side, and merge what is found in them.
            overlap: least part of a tile that its neighbours show too.
            batch: how many pictures or tiles of one size go through the model at once.

        Returns:
            A :class:`Detection` or :class:`Segmentation` for each picture, in their order.

        Raises:
            UserError: for a picture that cannot be read, by name, and for wrong settings.
            TypeError: for something else than a picture.
        """
        wanted = Wanted(score, classes, tile, overlap, batch)
        wanted.check(self)
        return list(self.stream(map(self.read, _each(images)), wanted))

    def stream(self, pictures: Iterable[Picture], wanted: Wanted) -> Iterator[Result]:
        """Yield results one after another; see :meth:`predict`."""
        waiting: list[Picture] = []
        for picture in pictures:
            waiting.append(picture)
            if len(waiting) == wanted.batch:
                yield from self.look(waiting, wanted)
                waiting = []
        yield from self.look(waiting, wanted)

    # --- reading ---

    def read(self, image) -> Picture:
        """Read a path, an array or a picture of Pillow.

        Raises:
            UserError: if it is not a picture that can be read.
            TypeError: if it is something else.
        """
        if isinstance(image, (str, os.PathLike)):
            return self._read_file(os.fspath(image))
        image = _array(image)
        return self.take(np.ascontiguousarray(_swapped(image)))

    @abstractmethod
    def _read_file(self, path: str) -> Picture:
        """Read a path; UserError if that is not a picture."""

    @abstractmethod
    def take(self, image: np.ndarray, name: str = '') -> Picture:
        """Take an array as OpenCV gives it: (H, W), (H, W, 3) BGR or (H, W, 4) BGRA."""

    # --- looking ---

    def look(self, pictures: Sequence[Picture], wanted: Wanted,
             progress: Callable[[int, int], None] | None = None) -> list[Result]:
        """Results of pictures that have been read; see :meth:`predict`.

        Args:
            pictures: of :meth:`read` or :meth:`take`.
            wanted: what is asked for.
            progress: called with the tiles of a picture that are done, and with all of them.
        """
        if wanted.tile is None:
            return self._batches([(each.source, each.data) for each in pictures], wanted)
        found: list[Result] = []
        for picture in pictures:
            tiles = tiles_of(picture.size, wanted.tile, wanted.overlap)
            image = picture.data['img']
            parts = self._batches([(picture.source, _cut(picture.data, tile.cut(image)))
                                   for tile in tiles], wanted, progress)
            if len(tiles) > 1:
                merge = merge_segmentations if self.finds_regions else merge_detections
                parts = [merge(parts, tiles, self._nothing(picture, parts))]
            found += parts
        return found

    def _nothing(self, picture: Picture, parts: Sequence[Result]) -> Result:
        if self.finds_regions:
            empty = np.full(picture.size, parts[0].nothing, dtype=parts[0].map.dtype)
            return Segmentation(picture.source, empty, self.names, self.palette)
        return Detection(picture.source, picture.size, *_no_objects(), self.names,
                         None if parts[0].rles is None else [])

    @abstractmethod
    def _batches(self, items: list[tuple[str | np.ndarray, dict]], wanted: Wanted,
                 progress: Callable[[int, int], None] | None = None) -> list[Result]:
        """Results of pictures or tiles, given as their source and data."""

    def _segmentation(self, source, labels: np.ndarray, wanted: Wanted) -> Segmentation:
        """The result of class numbers (H, W)."""
        kind = np.uint8 if len(self.names) <= np.iinfo(np.uint8).max else np.uint16
        result = Segmentation(source, labels.astype(kind), self.names, self.palette)
        if wanted.classes is not None:
            result.map[~np.isin(labels, self._labels(wanted))] = result.nothing
        return result

    def _detection(self, source, size: tuple[int, int], boxes: np.ndarray, scores: np.ndarray,
                   labels: np.ndarray, mask_of: Callable[[int], np.ndarray] | None,
                   wanted: Wanted) -> Detection:
        """The result of objects in any order.

        Args:
            source: of the picture.
            size: H and W.
            boxes: (N, 4) float32.
            scores: (N,).
            labels: (N,).
            mask_of: gives the mask (H, W) bool of an object by its index.
            wanted: what is asked for.
        """
        keep = scores >= (0.3 if wanted.score is None else wanted.score)
        if wanted.classes is not None:
            keep &= np.isin(labels, self._labels(wanted))
        boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, dtype=np.float32))
        if mask_of is not None:
            _put_around_masks(boxes, mask_of, keep)
        keep &= (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        order = np.flatnonzero(keep)[np.argsort(-scores[keep], kind='stable')]
        rles = None if mask_of is None else [encoded(mask_of(each)) for each in order]
        return Detection(source, size, boxes[order], scores[order].astype(np.float32),
                         labels[order].astype(np.int64), self.names, rles)

    def _labels(self, wanted: Wanted) -> list[int]:
        return [label for label, name in enumerate(self.names) if name in wanted.classes]


def _put_around_masks(boxes: np.ndarray, mask_of: Callable, which: np.ndarray) -> None:
    """Correct boxes in place for models that give masks alone, with boxes of no size."""
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    for each in np.flatnonzero(which & flat):
        mask = mask_of(each)
        if mask.any():
            boxes[each] = box_of(mask)


def _no_objects() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _cut(data: dict, image: np.ndarray) -> dict:
    return dict(data, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])


def _each(images) -> Iterable:
    """A single picture as a list of one."""
    single = isinstance(images, (str, os.PathLike, Image.Image)) or (
        isinstance(images, np.ndarray) and images.ndim < 4)
    return [images] if single else images


def _array(image) -> np.ndarray:
    """What is given as a picture, as an array of uint8 or uint16."""
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode not in ('L', 'RGB', 'RGBA', 'I;16'):
            image = image.convert('RGBA' if 'transparency' in image.info else
                                  'L' if image.mode == '1' else 'RGB')
        return np.asarray(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f'got a {type(image).__name__} as a picture, expected a path, a numpy '
                        'array or a picture of Pillow')
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    fits = image.ndim == 2 or image.ndim == 3 and image.shape[2] in (3, 4)
    if not fits or image.dtype not in (np.uint8, np.uint16) or not image.size:
        raise TypeError(f'got an array {image.shape} of {image.dtype} as a picture, expected '
                        '(H, W), (H, W, 3) or (H, W, 4) of uint8 or uint16; numbers from 0 to 1 '
                        'become one by (255 * x).astype(numpy.uint8)')
    return image


def _swapped(image: np.ndarray) -> np.ndarray:
    """RGB(A) to BGR(A)."""
    return image if image.ndim == 2 else image[..., [2, 1, 0, 3][:image.shape[2]]]


def rgb(image: np.ndarray) -> np.ndarray:
    """An image of a pipeline, (H, W) or (H, W, C) BGR, as (H, W, 3) uint8 RGB."""
    if image.ndim == 2 or image.shape[2] < 3:
        image = np.repeat(image.reshape(*image.shape[:2], -1)[..., :1], 3, axis=2)
    else:
        image = image[..., 2::-1]
    if image.dtype == np.uint16:
        image = image // 256
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
