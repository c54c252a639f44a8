"""Made-up images and annotations, for runs without a data set."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

__all__ = ['find_everything', 'synthetic_batch']

OBJECTS = 8  # per image


def synthetic_batch(model: nn.Module, shape: Sequence[int], batch: int, seed: int = 0) -> dict:
    """Noise as images, random boxes, masks or labels as annotations.

    Args:
        model: a detector or a segmentor of mmdet or mmseg.
        shape: (height, width) of the images.
        batch: number of images.
        seed: seeds the random numbers.

    Returns:
        What the model's data preprocessor takes: 'inputs', uint8 tensors (3, H, W), and
        'data_samples'. A detector gets 8 objects per image.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)
              for _ in range(batch)]
    make = _labels if hasattr(model, 'decode_head') else _objects
    meta = dict(img_path='', img_shape=tuple(shape), ori_shape=tuple(shape),
                pad_shape=tuple(shape), batch_input_shape=tuple(shape), scale_factor=(1.0, 1.0),
                flip=False)
    return dict(inputs=inputs, data_samples=[
        make(model, tuple(shape), meta, generator) for _ in range(batch)])


def _first(part: nn.Module) -> nn.Module:
    return part[0] if isinstance(part, nn.ModuleList) else part


def _labels(model: nn.Module, shape: tuple[int, int], meta: dict, generator) -> object:
    from mmseg.structures import SegDataSample
    classes = _first(model.decode_head).num_classes
    sample = SegDataSample(metainfo=meta)
    sample.gt_sem_seg = PixelData(
        data=torch.randint(0, classes, (1, *shape), generator=generator))
    return sample


def _objects(model: nn.Module, shape: tuple[int, int], meta: dict, generator) -> object:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    classes = _first(getattr(model, 'roi_head', model).bbox_head).num_classes
    boxes = _boxes(shape, generator)
    masks = np.zeros((OBJECTS, *shape), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(
        bboxes=boxes, masks=BitmapMasks(masks, *shape),
        labels=torch.randint(0, classes, (OBJECTS,), generator=generator))
    sample.ignored_instances = InstanceData(
        bboxes=boxes[:0], labels=torch.zeros(0, dtype=torch.long),
        masks=BitmapMasks(masks[:0], *shape))
    return sample


def _boxes(shape: tuple[int, int], generator) -> Tensor:
    """Boxes (OBJECTS, 4) of a tenth to a half of the image's sides."""
    size = torch.tensor([shape[1], shape[0]])
    sides = (0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=generator)) * size
    corner = torch.rand(OBJECTS, 2, generator=generator) * (size - sides)
    return torch.cat([corner, corner + sides], dim=1)


@torch.no_grad()
def find_everything(model: nn.Module) -> None:
    """Let the box heads of an untrained detector take every region for an object of class 0.

    Otherwise no score passes the threshold, and the final suppression and the mask head, which a
    trained detector spends time in, have nothing to do.
    """
    heads = getattr(getattr(model, 'roi_head', None), 'bbox_head', ())
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        if isinstance(getattr(head, 'fc_cls', None), nn.Linear):
            head.fc_cls.bias[0] += 10
