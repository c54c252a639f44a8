"""Size of the images, length of the training and its step, from what the data are like."""
from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

from mmhybrid.datasets.exports.preparing import Prepared

from .models import MINI, Backbone

__all__ = ['Plan', 'default_backbone', 'make_plan']

LONG, SHORT = 1333, 800  # of a detector's image, as COCO's recipes have them
_LITTLE = 256  # pixels; images up to here are small enough for a CPU
_TINY = 200  # pictures; statistics of BatchNorm are better kept than learned from so few
_OBJECT = 24  # pixels; below this median side of an object, images are enlarged


@dataclass
class Plan:
    """Numbers of a config.

    Attributes:
        scale: long and short side that images are resized into, keeping their ratio.
        batch: images per step.
        length: epochs of a detector, iterations of a segmentor.
        rate: learning rate for this batch.
        frozen_norms: keep the statistics of BatchNorm.
        tokens: places in the maps at strides 8 to 64 of the smallest image.
        why: sentences for people.
    """

    scale: tuple[int, int]
    batch: int
    length: int
    rate: float
    frozen_norms: bool
    tokens: int
    why: list[str]


def default_backbone(prepared: Prepared, gpu: bool) -> tuple[str, str]:
    """Short name of the backbone if nobody chooses, and why."""
    largest = max(max(one.size) for found in prepared.splits.values() for one in found)
    if not gpu and largest <= _LITTLE:
        return MINI, f'no GPU and images of at most {largest} pixels: a small network'
    return 'mambavision-t', 'the smallest of MambaVision with published weights'


def make_plan(prepared: Prepared, backbone: Backbone, weights: str | None, gpu: bool,
              batch: int | None = None) -> Plan:
    """Choose size, batch, length and step; ``batch`` if something else has chosen that."""
    sizes = np.array([one.size for found in prepared.splits.values() for one in found])
    long, short = np.percentile(sizes.max(1), 95), np.percentile(sizes.min(1), 95)
    count, why = len(prepared.splits['train']), []
    semantic = prepared.task == 'semantic'
    scale = _segmentor_scale(long, short) if semantic else _detector_scale(
        prepared, long, short, why)
    small = backbone.name == MINI
    batch = batch or min(8 if small else 4 if gpu or semantic else 2, max(1, count))
    batch = max(batch, 2) if semantic else batch
    steps = count / batch
    if semantic:
        length = int(min(40000, max(1000, 80 * steps)))
    else:
        length = int(min(60, max(12, math.ceil(1200 / steps))))
    per_image = 2e-3 / 8 if small else 1e-4 / 16
    rate = per_image * batch if small else max(per_image * batch, 2.5e-5) * (1 if weights else 2)
    frozen = bool(weights) and count < _TINY and backbone.family == 'MambaVision'
    why.append(f'{count} pictures: {length} {"iterations" if semantic else "epochs"} in batches '
               f'of {batch}')
    if frozen:
        why.append('so few pictures: BatchNorm keeps the statistics of the weights')
    return Plan(scale, batch, length, rate, frozen, _tokens(sizes, scale), why)


def _round(value: float, least: int = 64) -> int:
    return max(least, int(math.ceil(value / 32)) * 32)


def _detector_scale(prepared: Prepared, long: float, short: float, why: list[str]
                    ) -> tuple[int, int]:
    factor = min(LONG / long, SHORT / short)
    if factor <= 1:
        why.append(f'images are reduced into {LONG}x{SHORT}')
        return LONG, SHORT
    sides = [math.sqrt(thing.box[2] * thing.box[3]) for found in prepared.splits.values()
             for one in found for thing in one.things]
    grow = min(factor, 2.0) if float(np.median(sides)) < _OBJECT else 1.0
    scale = _round(long * grow), _round(short * grow)
    why.append(f'images of about {long:.0f}x{short:.0f} stay as they are' if grow == 1 else
               f'objects of {float(np.median(sides)):.0f} pixels: images are enlarged '
               f'{grow:.1f} times')
    return scale


def _tokens(sizes: np.ndarray, scale: tuple[int, int]) -> int:
    long, short = sizes.max(1), sizes.min(1)
    factor = np.minimum(scale[0] / long, scale[1] / short)
    sides = np.stack([long, short], 1) * factor[:, None]
    return int(sum(np.ceil(sides / stride).prod(1) for stride in (8, 16, 32, 64)).min())


def _segmentor_scale(long: float, short: float) -> tuple[int, int]:
    side = min(512, _round(short))
    return max(side, min(4 * side, round(long / short * side))), side


def workers() -> int:
    """Loading processes: two, or one where there are two cores."""
    return 1 if (os.cpu_count() or 1) <= 2 else 2
