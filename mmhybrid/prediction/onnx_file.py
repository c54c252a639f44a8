"""Prediction with a file of ``mmhybrid export``: onnxruntime and numpy, no PyTorch.

The file says under the key ``mmhybrid`` of its metadata how a picture becomes its input, and what
its outputs mean; :mod:`mmhybrid.export.description` writes that.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable

import cv2
import numpy as np

from mmhybrid.errors import UserError

from ..visualization import class_colors
from .base import Picture, PicturePredictor, Wanted, rgb
from .results import Detection, Result, Segmentation

__all__ = ['OnnxPredictor', 'open_session']

_INSTALL = "run: pip install onnxruntime (or pip install 'mmhybrid[onnx]')"


def open_session(path: str | os.PathLike):
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Raises:
        UserError: without the package, or for a file that it cannot read.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f'{os.fspath(path)} is run by the package onnxruntime, which cannot be '
                        f'imported ({error}); {_INSTALL}.') from error
    if not os.path.isfile(path):
        raise UserError(f'There is no file {os.fspath(path)}.')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own optimizations
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options,
                                            providers=['CPUExecutionProvider'])
    except Exception as error:  # its errors share no class
        if type(error).__module__.partition('.')[0] != 'onnxruntime':
            raise
        raise UserError(f'{os.fspath(path)} cannot be read by onnxruntime '
                        f'{onnxruntime.__version__}: {str(error).splitlines()[0]}. Is it whole, '
                        'and is its file .onnx.data, if there is one, beside it? Export it again.'
                        ) from error


class OnnxPredictor(PicturePredictor):
    """Finds objects or regions in pictures.

    Args:
        path: of the file.

    Raises:
        UserError: if it cannot be used; the message says what to do.
    """

    def __init__(self, path: str | os.PathLike):
        self.name, self.session = os.fspath(path), open_session(path)
        about = _description(self.session, self.name)
        self.about = about
        self.names = tuple(about['classes'])
        given = about.get('palette')
        self.palette = tuple(map(tuple, given)) if given else tuple(class_colors(len(self.names)))
        self.finds_regions = about['task'] == 'segmentation'
        self.notes = []
        self.fixed = about['size']  # [height, width], None for any
        self.places = about['batch']

    # --- reading ---

    def _read_file(self, path: str) -> Picture:
        if not os.path.lexists(path):
            raise UserError(f'There is no picture {path}.')
        try:
            content = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
        if image is None:
            raise UserError(f'{path} is empty or cannot be decoded. Fetch it again.')
        return Picture(path, dict(img=image, img_path=path))

    def take(self, image: np.ndarray, name: str = '') -> Picture:
        """Take an array as OpenCV gives it: (H, W), (H, W, 3) BGR or (H, W, 4) BGRA."""
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            # Through a decoder, which knows what becomes of grey, transparent and 16-bit pictures.
            content = cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1]
            image = cv2.imdecode(content, cv2.IMREAD_COLOR)
        return Picture(rgb(image), dict(img=image, img_path=name))

    # --- looking ---

    def _batches(self, items, wanted: Wanted,
                 progress: Callable[[int, int], None] | None = None) -> list[Result]:
        found: list[Result] = []
        for place, (source, data) in enumerate(items):
            if progress is not None:
                progress(place, len(items))
            found.append(self._look(source, data['img'], wanted))
        return found

    def _look(self, source, image: np.ndarray, wanted: Wanted) -> Result:
        resized = self._resized(image)
        x = self._input(resized)
        feed = {'image': np.repeat(x, self.places or 1, axis=0)}
        size = np.array(resized.shape[:2], dtype=np.float32)
        if not self.finds_regions:
            feed['size'] = np.repeat(size[None], self.places or 1, axis=0)
        names = [each.name for each in self.session.get_outputs()]
        outputs = {name: value[0] for name, value in zip(names, self.session.run(None, feed),
                                                         strict=True)}
        if self.finds_regions:
            return self._regions(source, outputs, resized.shape[:2], image.shape[:2], wanted)
        return self._objects(source, outputs, resized.shape[:2], image.shape[:2], wanted)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """The picture at the size that training tests with, and no larger than the input."""
        height, width = image.shape[:2]
        size, rule = (height, width), self.about['resize']
        if rule is not None and rule['keep_ratio']:
            short, long = sorted(rule['scale'])
            factor = min(long / max(size), short / min(size))
            size = tuple(int(side * factor + 0.5) for side in size)
        elif rule is not None:
            size = tuple(rule['scale'][::-1])
        if self.fixed is not None and any(np.greater(size, self.fixed)):
            factor = min(self.fixed[0] / size[0], self.fixed[1] / size[1])
            size = tuple(max(1, min(int(side * factor + 0.5), most))
                         for side, most in zip(size, self.fixed, strict=True))
        if size == (height, width):
            return image
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)

    def _input(self, image: np.ndarray) -> np.ndarray:
        """(1, 3, H, W) float32, normalised and padded."""
        about = self.about
        x = image[..., ::-1] if about['to_rgb'] else image
        x = (x.astype(np.float32) - np.float32(about['mean'])) / np.float32(about['std'])
        target = self.fixed
        if target is None:
            divisor = about['size_divisor']
            target = [-(-side // divisor) * divisor for side in image.shape[:2]]
        padded = np.empty((*target, 3), dtype=np.float32)
        padded[:] = np.float32(about['pad'])
        padded[:x.shape[0], :x.shape[1]] = x
        return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])

    def _regions(self, source, outputs, inner, size, wanted: Wanted) -> Segmentation:
        labels = outputs['labels'][:inner[0], :inner[1]]
        if inner != size:
            logits = outputs['logits'][:, :inner[0], :inner[1]].astype(np.float32)
            labels = _likeliest(logits, size, self.about['align_corners'])
        return self._segmentation(source, labels, wanted)

    def _objects(self, source, outputs, inner, size, wanted: Wanted) -> Detection:
        real = outputs['labels'] >= 0
        factor = np.array([size[1] / inner[1], size[0] / inner[0]] * 2, dtype=np.float32)
        boxes = outputs['boxes'][real].astype(np.float32) * factor
        masks, mask_of = outputs.get('masks'), None
        if masks is not None:
            masks, pasted = masks[real].astype(np.float32), boxes.copy()

            def mask_of(index):
                return paste(masks[index], pasted[index], size) >= self.about['mask_threshold']
        return self._detection(source, size, boxes, outputs['scores'][real].astype(np.float32),
                               outputs['labels'][real], mask_of, wanted)


def _description(session, name: str) -> dict:
    text = session.get_modelmeta().custom_metadata_map.get('mmhybrid')
    if text is None:
        raise UserError(f'{name} does not say how pictures go in and what comes out: it was not '
                        'written by `mmhybrid export`. Export the model with that.')
    about = json.loads(text)
    if about['format'] != 1:
        raise UserError(f'{name} was written by mmhybrid {about["version"]} in a form that this '
                        'version does not know; update mmhybrid.')
    if about['task'] == 'features':
        raise UserError(f'{name} holds the {about["part"]} of a model, which finds nothing in '
                        'pictures. Export the whole model: --part whole.')
    return about


def _likeliest(logits: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """Class (H, W) with the largest of logits (K, h, w) resized bilinearly."""
    rows, columns = (_taps(*pair, align_corners) for pair in zip(logits.shape[1:], size,
                                                                 strict=True))
    best = np.full(size, -np.inf, dtype=np.float32)
    label = np.zeros(size, dtype=np.int64)
    for number, plane in enumerate(logits):
        low, high, part = rows
        plane = plane[low] * (1 - part)[:, None] + plane[high] * part[:, None]
        low, high, part = columns
        plane = plane[:, low] * (1 - part) + plane[:, high] * part
        better = plane > best
        best[better], label[better] = plane[better], number
    return label


def _taps(inner: int, outer: int, align_corners: bool):
    """For each of ``outer`` places the two of ``inner``, and the share of the second."""
    place = np.arange(outer, dtype=np.float64)
    if align_corners:
        place = place * ((inner - 1) / max(outer - 1, 1))
    else:
        place = np.maximum((place + 0.5) * (inner / outer) - 0.5, 0)
    low = np.minimum(place.astype(np.int64), inner - 1)
    return low, np.minimum(low + 1, inner - 1), (place - low).astype(np.float32)


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (h, w) of probabilities over its box in a picture, (H, W) float32; zero elsewhere."""
    whole = np.zeros(size, dtype=np.float32)
    sides = []
    for start, end, cells, most in ((box[1], box[3], mask.shape[0], size[0]),
                                    (box[0], box[2], mask.shape[1], size[1])):
        if not end > start:
            return whole
        first = max(int(np.floor(start)) - 1, 0)
        last = min(int(np.ceil(end)) + 1, most)
        place = (np.arange(first, last, dtype=np.float32) + 0.5 - start) / (end - start)
        sides.append((first, last, _shares(place * cells - 0.5, cells)))
    (top, bottom, rows), (left, right, columns) = sides
    whole[top:bottom, left:right] = rows @ mask @ columns.T
    return whole


def _shares(place: np.ndarray, cells: int) -> np.ndarray:
    """Weights (places, cells) of linear interpolation; outside there are zeros."""
    return np.maximum(1 - np.abs(place[:, None] - np.arange(cells, dtype=np.float32)), 0)
