"""Time the kernels of attention at the shapes of MambaVision's windows, in turns.

    python tools/benchmark/attention.py --csv tools/benchmark/results/attention_gpu.csv
    python tools/benchmark/attention.py --only 'L.*s3' --dtype float16
    python tools/benchmark/attention.py --device cpu --small

The kernels are those behind scaled_dot_product_attention. Queries, keys and values lie as the model
has them, three views of one projection. 'default' is what PyTorch picks by itself, with the name of
the kernel that took most of its time; 'padded to 56' and 'padded to 64' lengthen heads of another
width with zeros, which changes nothing but the time (their scale stays that of the true width).
Every variant is first compared with float64 in its first head, gradients too; one that is wrong is
reported and not timed, and one that refuses a shape is left out, with its reason.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import (
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    TimeLimit,
    add_options,
    append_rows,
    as_graph,
    complete_options,
    environment,
    in_one_line,
    in_sequence,
    percentiles,
    relative_rms,
    seconds_per_call,
    take_turns,
)
from torch.nn.attention import SDPBackend, sdpa_kernel


class Shape(NamedTuple):
    """Attention over B windows of L tokens with ``heads`` heads of ``width`` channels."""

    name: str
    batch: int
    length: int
    heads: int
    width: int


# Windows of 112 and 56, as detectors have them, two images. L, L2: 49 channels a head.
GPU_SHAPES = tuple(
    Shape(f'MambaVision-{model} s{stage}', 2, length, heads * 2 ** (stage - 3), width)
    for model, heads, width in (('T', 8, 40), ('S', 8, 48), ('B', 8, 64), ('L', 16, 49))
    for stage, length in ((3, 12544), (4, 3136))
)
CPU_SHAPES = (Shape('MambaVision-T s3', 1, 1024, 8, 40), Shape('MambaVision-L s4', 1, 256, 32, 49))
SMALL = (Shape('even', 2, 64, 2, 40), Shape('uneven', 1, 37, 3, 49))

BACKENDS = {
    'flash': SDPBackend.FLASH_ATTENTION,
    'memory-efficient': SDPBackend.EFFICIENT_ATTENTION,
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'math': SDPBackend.MATH,
}
WIDTHS = (56, 64)
PASSES = ('forward', 'forward+backward')
COLUMNS = (
    *ENVIRONMENT, 'shape', 'B', 'L', 'heads', 'width', 'dtype', 'variant', 'pass', 'mode',
    *PERCENTILES, 'default_over_this', 'kernel', 'error_y', 'error_gradient',
)
WRONG = 'wrong, not timed'
REFUSED = 'refused'
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Beyond so many scores per call 'math', which keeps them all, is left out.
_SCORES = 1 << 28


def attend(qkv: torch.Tensor) -> torch.Tensor:
    """Attention as `mmhybrid.layers.Attention` calls it: (B, L, 3, heads, width) to (B, L, C)."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend_padded(qkv: torch.Tensor, width: int) -> torch.Tensor:
    """The same with heads lengthened by zeros."""
    own = qkv.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in F.pad(qkv, (0, width - own)).unbind(2))
    y = F.scaled_dot_product_attention(q, k, v, scale=own**-0.5)
    return y[..., :own].transpose(1, 2).flatten(2)


def variants(shape: Shape) -> dict[str, tuple[Callable, SDPBackend | None]]:
    """Name -> function of (B, L, 3, heads, width), and the only kernel that it may take."""
    found: dict[str, tuple[Callable, SDPBackend | None]] = {'default': (attend, None)}
    for name, backend in BACKENDS.items():
        if name != 'math' or shape.batch * shape.heads * shape.length**2 <= _SCORES:
            found[name] = attend, backend
    if shape.width % 8:
        for width in WIDTHS:
            found[f'padded to {width}'] = (lambda x, w=width: attend_padded(x, w)), None
    return found


def run(function, backend, qkv, backward: bool):
    """One call, and the gradient of the projection when asked for."""
    only = contextlib.nullcontext() if backend is None else sdpa_kernel([backend])
    with torch.set_grad_enabled(backward), only:
        y = function(qkv)
        return (y, torch.autograd.grad(y, qkv, torch.ones_like(y))[0]) if backward else (y, None)


def exact(qkv: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """The first heads in float64, row by row, so that no matrix of all scores is needed."""
    q, k, v = (x.transpose(1, 2)[:, :heads].double() for x in qkv.unbind(2))
    rows = [
        (part @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        for part in q.split(512, dim=2)
    ]
    return torch.cat(rows, 2).transpose(1, 2).flatten(2)


def kernel_name(call: Callable[[], object], device: str) -> str:
    """The kernel that takes most of a call's time; empty without a GPU."""
    if device != 'cuda':
        return ''
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total]
    longest = max(events, key=lambda event: event.self_device_time_total, default=None)
    return '' if longest is None else re.sub(r'\s+', ' ', longest.key)[:100]


def checked(shape: Shape, qkv) -> tuple[dict, list[dict]]:
    """Variants that are right, with their errors, and rows of those that are not timed."""
    leaf = qkv[:, :, :, :1].detach().double().requires_grad_()
    expected = exact(leaf)
    gradient = torch.autograd.grad(expected, leaf, torch.ones_like(expected))[0]
    right, left_out = {}, []
    for name, (function, backend) in variants(shape).items():
        try:
            y, got = run(function, backend, qkv.detach().requires_grad_(), True)
        except RuntimeError as error:
            print(f'{shape.name}: {name} refuses: {in_one_line(error)}', flush=True)
            left_out.append({'variant': name, 'mode': REFUSED})
            continue
        row = {'variant': name}
        errors = (relative_rms(y[..., : shape.width].detach(), expected.detach()),
                  relative_rms(got[:, :, :, :1], gradient))
        row['error_y'], row['error_gradient'] = (f'{error:.1e}' for error in errors)
        if max(errors) <= TOLERANCE[qkv.dtype]:
            right[name] = row
        else:
            left_out.append(row | {'mode': WRONG})
    return right, left_out


def measure(shape: Shape, args, failures: Failures) -> Iterator[dict]:
    """The rows of one shape, each as soon as it is known."""
    dtype = getattr(torch, args.dtype)
    common = environment(args.device, args.clock) | dict(
        shape=shape.name, B=shape.batch, L=shape.length, heads=shape.heads, width=shape.width,
        dtype=args.dtype)
    generator = torch.Generator(args.device).manual_seed(0)
    qkv = torch.randn(shape.batch, shape.length, 3, shape.heads, shape.width,
                      generator=generator, device=args.device).to(dtype)
    right, left_out = checked(shape, qkv)
    for row in left_out:
        yield common | row
    everything = variants(shape)
    for what in PASSES:
        backward = what == PASSES[1]
        x = qkv.detach().requires_grad_(backward)
        calls = {
            name: (lambda n=name, x=x, b=backward: run(*everything[n], x, b)) for name in right
        }
        kernels = {name: kernel_name(call, args.device) for name, call in calls.items()}
        for mode in args.modes:
            works = {}
            for name, call in calls.items():
                with failures.noted(f'{shape.name}: {name}: {what}, {mode}'):
                    work = (in_sequence if mode == 'eager' else as_graph)([call])
                    seconds_per_call(work, args.clock)
                    works[name] = work
            times = take_turns(works, args.rounds, args.clock, args.seconds)
            stamps = {name: percentiles(values) for name, values in times.items()}
            for name, stamp in stamps.items():
                row = common | right[name] | stamp | {'kernel': kernels[name]}
                if 'default' in stamps:
                    ratio = float(stamps['default']['p50_ms']) / float(stamp['p50_ms'])
                    row['default_over_this'] = f'{ratio:.2f}'
                yield row | {'pass': what, 'mode': mode}


def show(row: dict) -> str:
    """A row in one line, without what all rows share."""
    shown = ('shape', 'width', 'variant', 'pass', 'mode', 'p50_ms', 'default_over_this', 'kernel',
             'error_y', 'error_gradient')
    return '  '.join(f'{key} {row[key]}' for key in shown if row.get(key))


def parse_args(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=10, seconds=2)
    args = parser.parse_args(arguments)
    complete_options(parser, args)
    return args


def main(arguments=None) -> int:
    """Print the rows and keep them; return 1 when a variant is wrong or fails."""
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    wrong, failures, limit = [], Failures(), TimeLimit(args.minutes)
    for shape in SMALL if args.small else GPU_SHAPES if args.device == 'cuda' else CPU_SHAPES:
        if not re.search(args.only, shape.name) or limit.passed(shape.name):
            continue
        with failures.noted(shape.name):
            for row in measure(shape, args, failures):
                print(show(row), flush=True)
                if args.csv:
                    append_rows(args.csv, COLUMNS, [row])
                wrong += [row] * (row['mode'] == WRONG)
    return int(bool(failures or wrong))


if __name__ == '__main__':
    sys.exit(main())
