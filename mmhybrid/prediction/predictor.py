"""A detector or a segmentor that takes pictures and returns plain results."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image, ImageOps

from mmhybrid.errors import UserError
from mmhybrid.spelling import did_you_mean, nearest_few

from ..datasets.loading.pipeline_guard import guard_image_files
from ..engine.building import building
from ..visualization import class_colors
from .loading import Loaded, load_model
from .results import Detection, Result, Segmentation, box_of, encoded
from .tiles import merge_detections, merge_segmentations, tiles_of

__all__ = ['Loaded', 'Picture', 'Predictor', 'Wanted', 'load']


def load(weights: str | os.PathLike, config: str | os.PathLike | None = None, *,
         device: str | torch.device | None = None, tta: bool = False, trust: bool = False,
         options: dict | None = None) -> Predictor:
    """Load a trained detector or segmentor.

    Args:
        weights: a checkpoint of training (path, http(s) address or ``hf://...``), or the work
            directory of a run.
        config: the config file it was trained with; by default the one inside the checkpoint.
        device: such as 'cuda:1' or 'cpu'; by default a GPU if there is one.
        tta: test-time augmentation, as ``tools/test.py --tta``; detectors then give boxes only.
        trust: follow a config inside the checkpoint that can run code, and read a checkpoint that
            can.
        options: changes of the config by dotted name, as ``--cfg-options``.

    Returns:
        What predicts.

    Raises:
        UserError: if the weights cannot be used as they are; the message says what to do.
        WeightsError: if the file is damaged or could run code.
    """
    return Predictor(load_model(weights, config, device, tta, trust, options))


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

    def check(self, predictor: Predictor) -> None:
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
        return _rgb(self.data['img'])


class Predictor:
    """Finds objects or regions in pictures; made by :func:`mmhybrid.load`.

    Args:
        loaded: the model and what belongs to it.

    Attributes:
        names: names of the classes.
        notes: what was chosen or left out when the weights were loaded.
        model: the network, of mmdet or mmseg.
    """

    def __init__(self, loaded: Loaded):
        self.name, self.model, self.cfg = loaded.name, loaded.model, loaded.cfg
        self.names, self.notes = loaded.names, loaded.notes
        self.palette = loaded.palette or tuple(class_colors(len(self.names)))
        self.finds_regions = self.cfg.default_scope == 'mmseg'
        guard_image_files()
        first, *rest = loaded.pipeline
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope), building(
                f'The pipeline of {self.name}', self.cfg):
            self._loader = TRANSFORMS.build(_loader(first))
            self._steps = Compose(rest)

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
            UserError: if it is no picture that can be read.
            TypeError: if it is something else.
        """
        if isinstance(image, (str, os.PathLike)):
            return self._read_file(os.fspath(image))
        image = _array(image)
        return self.take(np.ascontiguousarray(_swapped(image)))

    def _read_file(self, path: str) -> Picture:
        if '://' not in path and not os.path.lexists(path):
            raise UserError(f'There is no picture {path}.')
        try:
            data = self._loader(dict(img_path=path, img_id=0))
        except UserError as error:
            raise UserError(str(error).replace('remove it from the data set', 'leave it out')
                            ) from error
        if data is None:  # a loader told to ignore them
            raise UserError(f'{path} is empty or cannot be decoded. Fetch it again.')
        return Picture(path, data)

    def take(self, image: np.ndarray, name: str = '') -> Picture:
        """Take an array as OpenCV gives it: (H, W), (H, W, 3) BGR or (H, W, 4) BGRA."""
        import mmcv
        kind = getattr(self._loader, 'color_type', 'color')
        if kind != 'color' or image.dtype != np.uint8 or image.shape[2:] != (3,):
            # Through a decoder, which knows what the loader makes of each kind of picture.
            import cv2
            content = cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1]
            image = mmcv.imfrombytes(content.tobytes(), flag=kind, backend='cv2')
        if getattr(self._loader, 'to_float32', False):
            image = image.astype(np.float32)
        return Picture(_rgb(image), dict(img=image, img_path=name, img_id=0,
                                         img_shape=image.shape[:2], ori_shape=image.shape[:2]))

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

    @torch.no_grad()
    def _batches(self, items: list[tuple[str | np.ndarray, dict]], wanted: Wanted,
                 progress: Callable[[int, int], None] | None = None) -> list[Result]:
        """Inputs of one size go together, so that no result depends on its neighbours."""
        found: list[Result | None] = [None] * len(items)
        groups: dict[tuple, list] = {}
        for place, (source, data) in enumerate(items):
            if progress is not None:
                progress(place, len(items))
            packed = self.packed(data)
            inputs = packed['inputs']
            shape = tuple(each.shape for each in inputs) if isinstance(inputs, list) else (
                inputs.shape)
            group = groups.setdefault(shape, [])
            group.append((place, source, packed))
            if len(group) == wanted.batch:
                self._run(groups.pop(shape), found, wanted)
        for group in groups.values():
            self._run(group, found, wanted)
        return found

    def packed(self, data: dict) -> dict:
        """What the pipeline makes of the data of a :class:`Picture`, for the model's preprocessor.

        Raises:
            UserError: if it leaves the picture out.
        """
        packed = self._steps(dict(data))
        if packed is None:
            raise UserError(f'{data["img_path"] or "A picture"} is left out by the pipeline of '
                            f'{self.name}, which returns nothing for it.')
        return packed

    def _run(self, group: list, found: list, wanted: Wanted) -> None:
        samples = self.model.test_step(pseudo_collate([packed for _, _, packed in group]))
        result = self._regions if self.finds_regions else self._objects
        for (place, source, _), sample in zip(group, samples, strict=True):
            found[place] = result(source, sample, wanted)

    def _regions(self, source, sample, wanted: Wanted) -> Segmentation:
        labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
        kind = np.uint8 if len(self.names) <= np.iinfo(np.uint8).max else np.uint16
        result = Segmentation(source, labels.astype(kind), self.names, self.palette)
        if wanted.classes is not None:
            result.map[~np.isin(labels, self._labels(wanted))] = result.nothing
        return result

    def _objects(self, source, sample, wanted: Wanted) -> Detection:
        if 'pred_instances' not in sample:
            raise UserError(f'{self.name} is a {type(self.model).__name__} that gives '
                            f'{", ".join(sample.keys())}; expected objects (pred_instances).')
        objects = sample.pred_instances.cpu()
        boxes = getattr(objects.bboxes, 'tensor', objects.bboxes).float().numpy()
        if boxes.shape[1:] != (4,):
            raise UserError(f'{self.name} gives boxes of {boxes.shape[1]} numbers; expected 4, '
                            'left, top, right, bottom.')
        size = tuple(sample.ori_shape[:2])
        scores, labels = objects.scores.float().numpy(), objects.labels.numpy()
        keep = scores >= (0.3 if wanted.score is None else wanted.score)
        if wanted.classes is not None:
            keep &= np.isin(labels, self._labels(wanted))
        boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, dtype=np.float32))
        masks = objects.get('masks')
        if masks is not None:
            _put_around_masks(boxes, masks, keep)
        keep &= (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        order = np.flatnonzero(keep)[np.argsort(-scores[keep], kind='stable')]
        rles = None if masks is None else [encoded(masks[each].numpy()) for each in order]
        return Detection(source, size, boxes[order], scores[order].astype(np.float32),
                         labels[order].astype(np.int64), self.names, rles)

    def _labels(self, wanted: Wanted) -> list[int]:
        return [label for label, name in enumerate(self.names) if name in wanted.classes]


def _put_around_masks(boxes: np.ndarray, masks: torch.Tensor, which: np.ndarray) -> None:
    """Correct boxes in place for models that give masks alone, with boxes of no size."""
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    for each in np.flatnonzero(which & flat):
        mask = masks[each].numpy()
        if mask.any():
            boxes[each] = box_of(mask)


def _no_objects() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _cut(data: dict, image: np.ndarray) -> dict:
    return dict(data, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])


def _loader(first) -> dict:
    """Settings of the step that reads a file; a place elsewhere that training read from is gone."""
    kind = str(first['type']).rpartition('.')[2]
    if kind in ('LoadImageFromNDArray', 'InferencerLoader', 'LoadImageFromWebcam'):
        return dict(type='LoadImageFromFile')
    if not kind.startswith('Load'):
        raise UserError(f'The pipeline of the model begins with {kind}; expected a step that loads '
                        'a picture, such as LoadImageFromFile.')
    return {key: value for key, value in first.items()
            if key not in ('backend_args', 'file_client_args')}


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


def _rgb(image: np.ndarray) -> np.ndarray:
    """An image of a pipeline, (H, W) or (H, W, C) BGR, as (H, W, 3) uint8 RGB."""
    if image.ndim == 2 or image.shape[2] < 3:
        image = np.repeat(image.reshape(*image.shape[:2], -1)[..., :1], 3, axis=2)
    else:
        image = image[..., 2::-1]
    if image.dtype == np.uint16:
        image = image // 256
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
