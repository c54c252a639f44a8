"""Half precision and whole numbers of 8 bits, made of a file in float32 by onnxruntime's tools."""
from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

__all__ = ['to_half', 'to_int8']

# Beside our own nodes, which are the scan and what chooses boxes.
_KEPT = ('TopK', 'Resize', 'Range', 'ConstantOfShape')


def to_half(source: Path, target: Path) -> Path:
    """Write a file with weights and most operators in float16; inputs and outputs stay float32.

    The scan, box operators and resizing stay in float32.

    Raises:
        UserError: without onnxruntime's tools.
    """
    import onnx

    from .nodes import PREFIX

    try:
        from onnxruntime.transformers import float16
    except ImportError as error:
        raise _absent('--half', error) from error
    model = onnx.load(source)
    blocked = [node.name for node in model.graph.node if node.name.startswith(PREFIX)]
    model = float16.convert_float_to_float16(
        model, keep_io_types=True, node_block_list=blocked,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_KEPT])
    onnx.save(model, target)
    return target


def to_int8(source: Path, target: Path) -> Path:
    """Write a file whose linear layers have weights of 8 bits; their inputs are scaled when run.

    Raises:
        UserError: without onnxruntime's tools.
    """
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise _absent('--int8', error) from error
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        folded = os.path.join(folder, 'folded.onnx')
        options = onnxruntime.SessionOptions()
        # Weights that are transposed in the graph become constants, which can be scaled.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = folded
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(source), options, providers=['CPUExecutionProvider'])
        with _silent():
            quantize_dynamic(folded, str(target), op_types_to_quantize=['MatMul', 'Gemm'],
                             weight_type=QuantType.QInt8, per_channel=True)
    return target


@contextmanager
def _silent() -> Iterator[None]:
    """The root logger is told to advise a step that has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _absent(option: str, error: ImportError) -> UserError:
    return UserError(f'{option} needs the package onnxruntime, which cannot be imported ({error}); '
                     "run: pip install 'mmhybrid[onnx]'")
