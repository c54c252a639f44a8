"""A detector or a segmentor that takes pictures and returns plain results."""
from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS, DefaultScope

from mmhybrid.errors import UserError

from ..datasets.loading.pipeline_guard import guard_image_files
from ..engine.building import building
from ..visualization import class_colors
from .base import Picture, PicturePredictor, Wanted, rgb
from .loading import Loaded, load_model
from .results import Detection, Result, Segmentation

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


class Predictor(PicturePredictor):
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
        return Picture(rgb(image), dict(img=image, img_path=name, img_id=0,
                                         img_shape=image.shape[:2], ori_shape=image.shape[:2]))

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

    def _run(self, group: list, found: list, wanted: Wanted) -> None:
        samples = self.model.test_step(pseudo_collate([packed for _, _, packed in group]))
        result = self._regions if self.finds_regions else self._objects
        for (place, source, _), sample in zip(group, samples, strict=True):
            found[place] = result(source, sample, wanted)

    def _regions(self, source, sample, wanted: Wanted) -> Segmentation:
        labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
        return self._segmentation(source, labels, wanted)

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
        masks = objects.get('masks')
        mask_of = None if masks is None else lambda index: masks[index].numpy()
        return self._detection(source, size, boxes, scores, labels, mask_of, wanted)


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
