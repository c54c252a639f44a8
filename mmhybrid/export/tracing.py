"""From a module of PyTorch to an ONNX file: ``torch.export``, then standard operators only."""
from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import torch
from torch import nn

from mmhybrid.errors import UserError

__all__ = ['OPSET', 'for_export', 'to_onnx']

#: The version of ONNX's operators that files are written in.
OPSET = 18
_OLDEST = (2, 9)


def to_onnx(module: nn.Module, inputs: tuple, names: Sequence[str], outputs: Sequence[str], *,
            shapes: tuple | None = None):
    """Trace a module and translate it.

    Args:
        module: in evaluation mode, within :func:`for_export`.
        inputs: examples.
        names: of the input tensors.
        outputs: names of the outputs.
        shapes: ``dynamic_shapes`` of ``torch.export.export``, where sizes are variables.

    Returns:
        ``torch.onnx.ONNXProgram``.

    Raises:
        UserError: without the packages, or with a PyTorch that is too old.
    """
    check_packages()
    from .operators import translations

    with torch.no_grad(), _quiet():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        return torch.onnx.export(
            program, (), input_names=list(names), output_names=list(outputs),
            opset_version=OPSET, dynamo=True, verbose=False, optimize=False,
            custom_translation_table=translations())


def check_packages() -> None:
    """Raise UserError unless everything that writes ONNX files can be imported."""
    version = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
    if version < _OLDEST:
        raise UserError(f'Export needs torch {".".join(map(str, _OLDEST))} or newer, and this is '
                        f'{torch.__version__}. Export in a newer environment; the file then runs '
                        'anywhere.')
    for name in ('onnx', 'onnxscript'):
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f'Export needs the package {name}, which cannot be imported ({error}); '
                            "run: pip install 'mmhybrid[onnx]'") from error


@contextmanager
def for_export(model: nn.Module) -> Iterator[None]:
    """Let all scans of a model in evaluation mode take the form for export."""
    before = [(module, name, getattr(module, name)) for module in model.modules()
              for name in ('backend', 'fused', 'with_cp') if hasattr(module, name)]
    for module, name, value in before:
        off = (False,) * len(value) if isinstance(value, tuple) else False
        setattr(module, name, 'export' if name == 'backend' else off)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its steps, and warns of what its own code does."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter('ignore')
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
