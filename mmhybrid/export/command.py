"""What ``mmhybrid export`` does."""
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import UserError, check_given
from ..prediction.loading import Loaded, load_model, untrained
from .description import default_size, describe, divisor_of
from .networks import part_of
from .smaller import to_half, to_int8
from .tracing import OPSET, check_packages, for_export, to_onnx

__all__ = ['export']

#: The largest difference to PyTorch that a file may have, over the largest value.
TOLERANCE = 1e-3
_DYNAMIC = ('VMamba',)


def export(args: argparse.Namespace) -> int:
    """Run the command.

    Args:
        args: of the parser in :mod:`mmhybrid.cli.export`.

    Returns:
        0.

    Raises:
        UserError: for everything that the user can put right.
    """
    check_given(args, 'source', 'weights', 'config', 'out')
    check_packages()
    out = _out(args)
    loaded = _loaded(args)
    for note in loaded.notes:
        print(f'note: {note.rstrip(".")}.', file=sys.stderr)
    network = part_of(loaded.model, args.part).eval()
    if args.dynamic:
        check_dynamic(loaded.model, args.part)
    size = _size(args, loaded)
    batch = 2 if args.dynamic else args.batch
    inputs = example(args.part == 'whole' and loaded.cfg.default_scope == 'mmdet', batch, size)
    about = describe(loaded, args.part, None if args.dynamic else size,
                     None if args.dynamic else args.batch, OPSET)
    write(network, inputs, about, out)
    told = [out]
    if args.half:
        told.append(to_half(out, out.with_suffix('.half.onnx')))
    if args.int8:
        told.append(to_int8(out, out.with_suffix('.int8.onnx')))
    _tell(told, network, inputs, about)
    return 0


def _out(args: argparse.Namespace) -> Path:
    name = args.out or f'{Path(args.source.rstrip("/")).stem}.onnx'
    out = Path(name).expanduser()
    if out.suffix != '.onnx':
        raise UserError(f'--out {name} has to end in .onnx.')
    if not out.parent.is_dir():
        raise UserError(f'--out {name}: there is no folder {out.parent}.')
    if out.exists() and not args.overwrite:
        raise UserError(f'{out} is there already. Name another file with --out, or replace it '
                        'with --overwrite.')
    return out


def _loaded(args: argparse.Namespace) -> Loaded:
    options = args.cfg_options
    if not args.source.endswith('.py'):
        if args.weights:
            raise UserError(f'--weights {args.weights} belongs to a config, and {args.source} is a '
                            'run or a checkpoint, which has weights. Leave one out.')
        return load_model(args.source, args.config, 'cpu', trust=args.trust, options=options)
    if args.weights:
        return load_model(args.weights, args.source, 'cpu', trust=args.trust, options=options)
    return untrained(args.source, options)


def _size(args: argparse.Namespace, loaded: Loaded) -> tuple[int, int]:
    if args.size is None:
        return default_size(loaded)
    size = tuple(args.size) * (2 if len(args.size) == 1 else 1)
    if len(size) != 2 or min(size) < 32:
        raise UserError(f'--size {" ".join(map(str, args.size))}: expected a side, or height and '
                        'width, of 32 pixels or more.')
    divisor = divisor_of(loaded.model)
    if args.part == 'whole' and any(side % divisor for side in size):
        raise UserError(f'--size {" ".join(map(str, size))}: the model pads pictures to multiples '
                        f'of {divisor}; give such sides.')
    return size


def check_dynamic(model: nn.Module, part: str) -> None:
    """Raise UserError for what is computed for one size alone, with the reason.

    Args:
        model: whole, or a backbone.
        part: 'whole', 'neck' or 'backbone'.
    """
    backbone = getattr(model, 'backbone', model)
    kind = type(backbone).__name__
    reasons = {
        'MambaVision': 'its windows of several pictures are put together for one size',
        'Vim': 'its last patches are padded, and its position embedding resized, for one size',
        'LocalVim': 'its position embedding is resized, and its windows overhang the map or do '
                    'not, for one size',
        'LocalVMamba': 'its windows overhang the map, or do not, for one size',
    }
    reason = reasons.get(kind)
    if part == 'whole':
        reason = ('the heads of a whole model choose their numbers of boxes, or the cells that '
                  'they pool, for one size; --part backbone and neck may be of any')
    elif reason is None and any(type(m).__name__ == 'PatchMerging' for m in backbone.modules()):
        reason = "downsample='v1' pads odd sides, or does not, for one size"
    elif reason is None and kind not in _DYNAMIC:
        reason = f'that is tested with {" and ".join(_DYNAMIC)} alone'
    if reason:
        raise UserError(f'--dynamic cannot be had for this model ({kind}, --part {part}): '
                        f'{reason}. Export one file for each size: --size HEIGHT WIDTH.')


def example(with_size: bool, batch: int, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Made-up inputs: an image of noise, and for detectors the size of the picture in it."""
    noise = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, *size, generator=noise)
    sizes = torch.tensor([size] * batch, dtype=torch.float32)
    return (image, sizes) if with_size else (image,)


def write(network: nn.Module, inputs: tuple[torch.Tensor, ...], about: dict, out: Path) -> None:
    """Trace a network and write the file, whole or not at all.

    Args:
        network: of :mod:`mmhybrid.export.networks`.
        inputs: of :func:`example`.
        about: of :func:`mmhybrid.export.description.describe`.
        out: the file; beside it ``NAME.onnx.data`` takes weights of more than 2 GB together.
    """
    with torch.no_grad(), for_export(network):
        results = network(*inputs)
        names = getattr(network, 'outputs', [f'map{n}' for n in range(len(results))])
        any_size = about['size'] is None
        program = to_onnx(network, inputs, ['image', 'size'][:len(inputs)], names, shapes=(
            dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),) if any_size else None)
    program.model.metadata_props['mmhybrid'] = json.dumps(about)
    program.model.producer_name, program.model.producer_version = 'mmhybrid', about['version']
    part = out.with_name(f'.{out.name}')
    try:
        program.save(part)
        data = part.with_name(f'{part.name}.data')
        if data.exists():  # the file names it
            data.unlink()
            program.save(out)
        else:
            os.replace(part, out)
    except OSError as error:
        raise UserError(f'{out} could not be written: {error.strerror or error}. Free some space, '
                        'or write elsewhere with --out FILE.') from error
    finally:
        part.unlink(missing_ok=True)


def _tell(files: list[Path], network: nn.Module, inputs: tuple, about: dict) -> None:
    shape = ' x '.join('any' if side is None else str(side) for side in (
        about['batch'], 3, *(about['size'] or (None, None))))
    print(f'{about["part"]} of {about["source"]}, input {shape}, opset {about["opset"]}')
    for number, path in enumerate(files):
        data = path.with_name(f'{path.name}.data')
        size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
        error = difference(path, network, inputs)
        told = ('not compared with PyTorch: onnxruntime is not installed' if error is None else
                f'differs from PyTorch by {error:.1e} of the largest value')
        print(f'{path}: {size / 2 ** 20:.1f} MiB, {told}')
        if number == 0 and error is not None and error > TOLERANCE:
            raise UserError(f'{path} differs from PyTorch by {error:.1e} of the largest value; '
                            f'{TOLERANCE} is allowed. Please report this with the config.')


def difference(path: Path, network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float | None:
    """Largest difference of a file from its network, over the largest value of each output.

    Of a file for any size also at another, odd size.  Class numbers are left out: near a tie they
    may be others.

    Returns:
        None without onnxruntime.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return None
    from ..prediction.onnx_file import open_session

    session = open_session(path)
    cases = [inputs]
    if not isinstance(session.get_inputs()[0].shape[2], int):
        noise = torch.Generator().manual_seed(1)
        height, width = inputs[0].shape[2:]
        cases.append((torch.randn(1, 3, height // 2 + 1, width - 3, generator=noise),))
    found = 0.
    for case in cases:
        feed = {each.name: value.numpy() for each, value in zip(session.get_inputs(), case,
                                                                strict=True)}
        with torch.no_grad():
            expected = network(*case)
        for right, got in zip(expected, session.run(None, feed), strict=True):
            if right.is_floating_point():
                gap = np.abs(got.astype(np.float32) - right.numpy()).max()
                found = max(found, float(gap / right.abs().max().clamp_min(1e-12)))
    return found
