"""What a file says of itself, so that a picture can go in and a result come out anywhere."""
from __future__ import annotations

from mmengine.config import ConfigDict
from torch import nn

from mmhybrid import __version__

from ..errors import UserError
from ..prediction.loading import Loaded

__all__ = ['default_size', 'describe', 'divisor_of']

_LOADERS = ('LoadImageFromFile', 'LoadImageFromNDArray', 'InferencerLoader')
_PREPROCESSORS = ('DetDataPreprocessor', 'SegDataPreProcessor', 'ColourPadPreprocessor')


def describe(loaded: Loaded, part: str, size: tuple[int, int] | None, batch: int | None,
             opset: int) -> dict:
    """The metadata of a file.

    Args:
        loaded: the model and what belongs to it.
        part: 'whole', 'neck' or 'backbone'.
        size: height and width of the input, None for any.
        batch: images of the input, None for any.
        opset: version of ONNX's operators.

    Returns:
        Plain values, for JSON.

    Raises:
        UserError: for a pipeline that a runtime without mmcv could not follow.
    """
    model = loaded.model
    preprocessor = getattr(model, 'data_preprocessor', None)
    about = dict(format=1, version=__version__, part=part, task='features', size=size and
                 list(size), batch=batch, opset=opset, source=loaded.name,
                 classes=list(loaded.names), palette=loaded.palette)
    mean = getattr(preprocessor, 'mean', None)
    if mean is not None:
        about.update(mean=mean.flatten().tolist(), std=preprocessor.std.flatten().tolist())
    else:
        about.update(mean=[0.] * 3, std=[1.] * 3)
    about.update(to_rgb=bool(getattr(preprocessor, '_channel_conversion', False)
                             or getattr(preprocessor, 'channel_conversion', False)),
                 size_divisor=divisor_of(model), pad=_pad(preprocessor))
    if part != 'whole':
        return about
    if type(preprocessor).__name__ not in _PREPROCESSORS:
        raise UserError(f'{loaded.name} prepares pictures by {type(preprocessor).__name__}; export '
                        f'knows {", ".join(_PREPROCESSORS)}. Its features can be written: --part '
                        'neck or backbone.')
    about['resize'] = _resize(loaded)
    if loaded.cfg.default_scope == 'mmseg':
        about.update(task='segmentation', align_corners=bool(model.align_corners))
    else:
        about.update(task='detection',
                     mask_threshold=float(model.test_cfg.rcnn.get('mask_thr_binary', 0.5)))
    return about


def divisor_of(model: nn.Module) -> int:
    """What sides of an input are padded to a multiple of."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    found = getattr(preprocessor, 'pad_size_divisor', 1)
    test = getattr(preprocessor, 'test_cfg', None)
    if type(preprocessor).__name__ == 'SegDataPreProcessor':
        found = (test or {}).get('size_divisor') or 1
    return int(found)


def _pad(preprocessor) -> list[float]:
    colour = getattr(preprocessor, 'pad_colour', None)
    if colour is not None:
        return colour.flatten().tolist()
    return [float(getattr(preprocessor, 'pad_value', 0) or 0)] * 3


def _resize(loaded: Loaded) -> dict | None:
    """The one step between loading and packing that is allowed: a resize to a scale."""
    rule = None
    for step in loaded.pipeline:
        kind = str(step['type']).rpartition('.')[2]
        if kind in _LOADERS and step.get('color_type', 'color') == 'color' or kind.startswith(
                'Pack'):
            continue
        scale = step.get('scale')
        if kind != 'Resize' or rule is not None or not isinstance(scale, (tuple, list)) or (
                step.get('interpolation', 'bilinear') != 'bilinear'):
            raise UserError(
                f'The pipeline of {loaded.name} has the step {_shown(step)}, and a file can say of '
                'one Resize with scale=(width, height) alone. Change the pipeline of '
                'test_dataloader, or write the features: --part neck or backbone.')
        rule = dict(scale=[int(side) for side in scale], keep_ratio=bool(step.get('keep_ratio')))
    return rule


def _shown(step: ConfigDict) -> str:
    values = ', '.join(f'{key}={value!r}' for key, value in step.items() if key != 'type')
    return f'{step["type"]}({values})'


def default_size(loaded: Loaded) -> tuple[int, int]:
    """Height and width of the input where the user names none.

    That of the largest picture for a detector, that of training for a segmentor.
    """
    size = getattr(getattr(loaded.model, 'data_preprocessor', None), 'size', None)
    if size is None:
        scale = next((step['scale'] for step in loaded.pipeline if step.get('scale')), (512, 512))
        size = scale[::-1]
    divisor = divisor_of(loaded.model)
    return tuple(-(-int(side) // divisor) * divisor for side in size)
