"""Our operators, and how they are written in standard ones of ONNX."""
from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from ..ops.cross_scan import orders
from . import boxes as _boxes  # noqa: F401  registers operators
from . import scan as scans
from .nodes import call, constant, numbers, tensor

__all__ = ['translations']


def translations() -> dict:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``."""
    ours = torch.ops.mmhybrid
    return {
        ours.export_scan.default: scans.scan,
        ours.reorder.default: reorder,
        ours.scan_tables.default: scan_tables,
        ours.export_nms.default: nms,
        ours.export_roi_align.default: roi_align,
    }


def reorder(x, table, inverse, holes: bool, inverse_holes: bool):
    """Nodes of :func:`mmhybrid.ops.reorder.reorder` for a table that all rows share."""
    assert len(table.shape) == 1, 'models read by one table'
    taken = call('Gather', x, table, axis=len(x.shape) - 1)
    if not holes:
        return taken
    real = call('GreaterOrEqual', table, numbers(0, np.int32))
    return call('Mul', taken, call('Cast', real, to=x.dtype.value))


def scan_tables(like, kind: str, window: int, flip: bool, height, width, class_token=None):
    """Nodes of the tables of :mod:`mmhybrid.ops.cross_scan.orders`, for sizes of the run."""
    if all(isinstance(side, int) for side in (height, width, class_token or 0)):
        tables = orders._tables('cpu', kind, window, flip, height, width, class_token)
        return [tensor(table.numpy()) for table in tables]
    order, inverse = _map_tables(kind, window, _number(height), _number(width))
    if class_token is not None:
        token = _number(class_token)
        at = call('Sub', call('Shape', order), token) if flip else token
        order = _inserted(_raised(order, token), at, token)
        inverse = _inserted(_raised(inverse, at), token, at)
    return [call('Cast', table, to=ir.DataType.INT32.value) for table in (order, inverse)]


def _number(side):
    """A size as a value of shape (1,)."""
    return constant([side]) if isinstance(side, int) else call('Reshape', side, constant([1]))


def _map_tables(kind: str, window: int, height, width):
    row = call('Unsqueeze', _range(height), constant([1]))
    column = call('Unsqueeze', _range(width), constant([0]))
    token = call('Add', call('Mul', row, width), column)
    if kind == 'h':
        return _flat(token), _flat(token)
    if kind == 'v':
        inverse = call('Add', call('Mul', column, height), row)
        return _flat(call('Transpose', token, perm=[1, 0])), _flat(inverse)
    side = constant([window])
    rows, columns = (
        call('Div', call('Add', sides, constant([window - 1])), side) for sides in (height, width))
    of_window = call('Add', call('Mul', call('Div', row, side), columns),
                     call('Div', column, side))
    inverse = call('Add', call('Mul', of_window, side), call('Mod', row, side))
    inverse = call('Add', call('Mul', inverse, side), call('Mod', column, side))
    row = call('Reshape', _range(call('Mul', rows, side)), constant([-1, 1, window, 1]))
    column = call('Reshape', _range(call('Mul', columns, side)), constant([1, -1, 1, window]))
    real = call('And', call('Less', row, height), call('Less', column, width))
    order = call('Where', real, call('Add', call('Mul', row, width), column), constant([-1]))
    return _flat(order), _flat(inverse)


def _range(end):
    return call('Range', numbers(0), call('Squeeze', end), numbers(1))


def _flat(table):
    return call('Reshape', table, constant([-1]))


def _raised(table, start):
    """One more from ``start`` on, to make room."""
    later = call('GreaterOrEqual', table, start)
    return call('Add', table, call('Cast', later, to=ir.DataType.INT64.value))


def _inserted(table, at, value):
    before = call('Slice', table, constant([0]), at, constant([0]))
    after = call('Slice', table, at, call('Shape', table), constant([0]))
    return call('Concat', before, value, after, axis=0)


# --- boxes ----------------------------------------------------------------------------------------

def nms(boxes, scores, iou_threshold: float, score_threshold: float, most: int):
    """Nodes of :func:`mmhybrid.export.boxes.nms`."""
    found = call('NonMaxSuppression', boxes, call('Unsqueeze', scores, constant([1])),
                 constant([most]), numbers([iou_threshold], np.float32),
                 numbers([score_threshold], np.float32))
    place = call('Gather', found, constant([0, 2]), axis=1)  # class and box
    kept = call('GatherND', scores, place)
    # Some runtimes tell the best of all classes together, others class after class.
    count = call('Shape', kept)
    top = call('Min', count, constant([most]))
    values, order = call('TopK', kept, top, num_outputs=2)
    place = call('Gather', place, order, axis=0)
    missing = call('Sub', constant([most]), top)
    pads = call('Concat', constant([0, 0]), missing, constant([0]), axis=0)
    place = call('Pad', place, pads, numbers(-1))
    classes, index = call('Split', place, constant([1, 1]), num_outputs=2, axis=1)
    return [call('Squeeze', part, constant([1])) for part in (classes, index)]


def roi_align(maps, rois, levels, size: int, scales, samples: int, aligned: bool):
    """Nodes of :func:`mmhybrid.export.boxes.roi_align`."""
    parts, places = [], []
    for level, (of_level, scale) in enumerate(zip(maps, scales, strict=True)):
        mine = call('NonZero', call('Equal', levels, numbers(level)))
        place = call('Squeeze', mine, constant([0]))
        chosen = call('Gather', rois, place, axis=0)
        image = call('Cast', call('Squeeze', _columns(chosen, 0, 1), constant([1])),
                     to=ir.DataType.INT64.value)
        parts.append(call(
            'RoiAlign', of_level, _columns(chosen, 1, 5), image, mode='avg', output_height=size,
            output_width=size, sampling_ratio=samples, spatial_scale=float(scale),
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel'))
        places.append(place)
    if len(parts) == 1:
        return parts[0]
    place = call('Concat', *places, axis=0)
    total = call('Squeeze', call('Shape', place))
    back = call('ScatterElements', place, place, call('Range', numbers(0), total, numbers(1)))
    return call('Gather', call('Concat', *parts, axis=0), back, axis=0)


def _columns(x, start: int, end: int):
    return call('Slice', x, constant([start]), constant([end]), constant([1]))
