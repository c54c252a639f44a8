"""``--image-size``: all sizes of pipelines and model, in proportion."""
from __future__ import annotations

import math
from collections.abc import Iterator

from mmhybrid.errors import UserError

__all__ = ['apply_image_size']

SIZES = ('scale', 'scales', 'crop_size', 'img_scale', 'input_size', 'size', 'border')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
FIXED = 64  # a divisor of padded sides from here on is meant as a size
STRIDES = (4, 8, 16, 32)


def apply_image_size(cfg, pixels: int) -> list[str]:
    """Let images have another size.

    Args:
        cfg: the config, changed in place.
        pixels: longer side of the largest images that train, or side of the crops.

    Returns:
        Notes for the log.

    Raises:
        UserError: the pipeline names no size.
    """
    places = [cfg.get(name) for name in LOADERS] + [dict(pipeline=cfg.get('tta_pipeline') or [])]
    everything = [step for place in places for pipeline in _pipelines(place)
                  for step in _steps(pipeline)]
    for step in everything:
        if str(step.get('type')).endswith('TimmTransform'):
            step.setdefault('input_size', 224)  # its default is a size, too
    train = [step for pipeline in _pipelines(cfg.train_dataloader) for step in _steps(pipeline)]
    before = _side(train, cfg)
    if before is None:
        raise UserError(f'--image-size {pixels}: the training pipeline and the data preprocessor '
                        'name no size that it could change. Add a Resize, or a RandomCrop, to the '
                        'pipeline.')
    factor, changed = pixels / before, []
    done: set[int] = set()  # one pipeline may stand in two places
    for step in everything:
        if id(step) not in done:
            done.add(id(step))
            _resize(step, factor)
    changed += _resize_model(cfg.model, factor, before)
    about = f'; {", ".join(changed)}' if changed else ''
    return [f'--image-size {pixels}: sizes of the pipelines are {factor:.3g} times what they were '
            f'(the largest was {before}){about}.']


def _pipelines(node) -> Iterator[list]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == 'pipeline' and isinstance(value, (list, tuple)):
                yield value
            else:
                yield from _pipelines(value)
    elif isinstance(node, (list, tuple)):
        for each in node:
            yield from _pipelines(each)


def _steps(node) -> Iterator[dict]:
    """All transforms, those inside others too."""
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _steps(each)
    elif isinstance(node, dict):
        yield node
        yield from _steps(node.get('transforms'))


def _side(steps: list[dict], cfg) -> int | None:
    """Side that the size is told by: that of the last crop to a fixed one, else the largest."""
    about = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if about.get('size'):
        return max(about.size)
    crops = [max(_numbers(step['crop_size'])) for step in steps if _numbers(step.get('crop_size'))
             and step.get('crop_type', 'absolute') == 'absolute']
    if crops:
        return crops[-1]
    return max((number for step in steps for key in SIZES
                for number in _numbers(step.get(key))), default=None)


def _numbers(value) -> list[int]:
    """Pixels in a setting; shares of an image are not whole numbers."""
    if isinstance(value, (list, tuple)):
        return [number for each in value for number in _numbers(each)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _resized(value, factor: float):
    if isinstance(value, (list, tuple)):
        return type(value)(_resized(each, factor) for each in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return int(math.copysign(max(1, round(abs(value) * factor)), value)) if value else value


def _resize(step: dict, factor: float) -> None:
    for key in SIZES:
        if _numbers(step.get(key)):
            step[key] = _resized(step[key], factor)


def _resize_model(model, factor: float, before: int) -> list[str]:
    """Change what a model knows of its images; returns what."""
    changed = []

    def change(node, path: str, key: str, value) -> None:
        if value != node[key]:
            changed.append(f'{path}.{key} {value} instead of {node[key]}')
            node[key] = value

    about, test = model.get('data_preprocessor') or {}, model.get('test_cfg') or {}
    if about.get('size'):
        change(about, 'model.data_preprocessor', 'size', _resized(tuple(about.size), factor))
    if (about.get('pad_size_divisor') or 1) > FIXED:
        change(about, 'model.data_preprocessor', 'pad_size_divisor',
               _multiple(about.pad_size_divisor * factor, 32))
    for each in about.get('batch_augments') or []:
        _resize(each, factor)
    for key in ('crop_size', 'stride'):
        if test.get('mode') == 'slide' and test.get(key):
            change(test, 'model.test_cfg', key, _resized(tuple(test[key]), factor))
    backbone = model.get('backbone') or {}
    for node, path in ((backbone, 'model.backbone'),
                       (backbone.get('settings') or {}, 'model.backbone.settings')):
        if node.get('img_size'):
            sides = node.img_size
            whole = tuple(_multiple(side * factor, 16) for side in _numbers(sides))
            change(node, path, 'img_size', whole if isinstance(sides, (list, tuple)) else whole[0])
    arch = backbone.get('arch')
    for node, path in ((backbone, 'model.backbone'), (arch, 'model.backbone.arch')):
        if isinstance(node, dict) and isinstance(node.get('window_size'), (list, tuple)):
            change(node, path, 'window_size', _windows(tuple(node.window_size), factor, before))
    return changed


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)


def _windows(sizes: tuple, factor: float, before: int) -> tuple:
    """Windows that held a whole map go on to do so; the others have their size for a reason."""
    return tuple(math.ceil(size * factor) if stride >= 16 and size * stride >= before else size
                 for size, stride in zip(sizes, STRIDES, strict=False))
