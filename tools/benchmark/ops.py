"""Time the backends of the selective scan in turns: eager and as a CUDA graph, beside the floor.

    python tools/benchmark/ops.py --csv tools/benchmark/results/selective_scan_gpu.csv
    python tools/benchmark/ops.py --device cpu --clock cpu --threads 1
    python tools/benchmark/ops.py --only 'seg|VMamba' --dtype float16 --plot scan.png

Takes a GPU if there is one. Every backend is first compared with a float64 scan, gradients
included; one that is wrong is reported and not timed, one that raises is reported and left out.
Rows are written as they are measured, and --minutes limits the run. Anchors in the same run: on a
GPU the CUDA scan of mamba_ssm when it can be imported, on a CPU the sequential reference. Backends
take turns (A B A B), so that a change of the machine's load hits all of them. On a GPU, calls
rotate over copies of their inputs that together exceed the cache. --clock cpu counts the process's
own time: use it with --threads 1 on a machine that others use. With --require the exit code is 1
when a backend is too slow.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from timing import (
    CLOCKS,
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    TimeLimit,
    append_rows,
    as_graph,
    default_clock,
    environment,
    in_sequence,
    input_sets,
    percentiles,
    plot_rows,
    relative_rms,
    seconds_per_call,
    take_turns,
)

from mmhybrid.ops import available_backends, selective_scan


class Shape(NamedTuple):
    """One call: B sequences of L tokens, D channels, N states, and whether it has a gate."""

    name: str
    batch: int
    length: int
    channels: int
    state: int
    gate: bool = False


# One size of every family comes first, so that a short run sees all kinds of shapes.
GPU_SHAPES = (
    *(shape for m, d in (('T', 160), ('S', 192), ('B', 256)) for shape in (
        Shape(f'detection MambaVision-{m} s3', 2, 12544, d, 8),
        Shape(f'detection MambaVision-{m} s4', 2, 3136, 2 * d, 8),
        Shape(f'segmentation MambaVision-{m} s3', 2, 4096, d, 8),
        Shape(f'segmentation MambaVision-{m} s4', 2, 1024, 2 * d, 8),
        Shape(f'classification MambaVision-{m} s3', 128, 196, d, 8),
        Shape(f'classification MambaVision-{m} s4', 128, 49, 2 * d, 8),
        *([Shape(f'VMamba-T 512 stage {i + 1}', 2, 16384 >> 2 * i, 384 << i, 1)
           for i in range(4)] if m == 'T' else []),
        *([Shape('Vim-S 1248 one direction', 1, 6085, 768, 16, gate=True)] if m == 'T' else []),
    )),
    Shape('segmentation MambaVision-S s3 window 160', 2, 25600, 192, 8),
)
CPU_SHAPES = (
    Shape('segmentation s3', 2, 4096, 160, 8),
    Shape('detection s3, one image', 1, 12544, 160, 8),
    Shape('classification s3', 64, 196, 160, 8),
    Shape('classification s4', 64, 49, 320, 8),
)
SMALL = (Shape('even', 2, 64, 32, 8), Shape('uneven', 1, 37, 40, 1, gate=True))

COLUMNS = (
    *ENVIRONMENT, 'shape', 'B', 'L', 'D', 'N', 'even', 'dtype', 'layout', 'backend', 'pass', 'mode',
    *PERCENTILES, 'floor_ms', 'reference_over_this', 'cuda_over_this', 'saved_MB', 'error_y',
    'worst_gradient', 'error_gradient',
)
PASSES = ('forward', 'forward+backward')
WRONG = 'wrong, not timed'
FAILED = 'failed, not timed'

# Bytes, exponentials and float32 operations per second of GPUs whose floor is known.
RATES = {'H200': (4.3e12, 4.18e12, 33.4e12)}
# RMS error against float64 beyond which nothing is timed: two roundings to the stored dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def floor_ms(shape: Shape, dtype: torch.dtype, backward: bool, device: str) -> float | None:
    """Lower bound of forward, or forward plus backward: traffic, exponentials or arithmetic."""
    rates = next((rates for name, rates in RATES.items() if name in device), None)
    if rates is None:
        return None
    elements = shape.batch * shape.length * shape.channels
    shared = 2 * shape.batch * shape.length * shape.state  # B and C
    size, gate = dtype.itemsize, int(shape.gate)

    def bound(tensors, rows, operations):
        work = (
            (tensors * elements + rows * shared) * size,
            elements * (shape.state + 2 + 2 * gate),
            elements * operations,
        )
        return max(amount / rate for amount, rate in zip(work, rates, strict=True)) * 1e3

    forward = bound(3 + gate, 1, 6 * shape.state + 10)
    # u, delta, dy in; du, ddelta out; the gate and its gradient.
    return forward + bound(5 + 2 * gate, 2, 10 * shape.state + 14) if backward else forward


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int, token_major: bool):
    """Inputs with steps and decay rates like those of a trained mixer."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device)

    def tokens(channels):
        x = normal(shape.batch, shape.length, channels).to(dtype)
        return x.transpose(1, 2) if token_major else x.transpose(1, 2).contiguous()

    channels, state = shape.channels, shape.state
    inputs = {
        'u': tokens(channels),
        'delta': tokens(channels),
        'A': -torch.arange(1.0, state + 1, device=device).repeat(channels, 1),
        'B': tokens(state),
        'C': tokens(state),
        'D': torch.ones(channels, device=device),
        'delta_bias': normal(channels) - 3,
    }
    return inputs | ({'z': tokens(channels)} if shape.gate else {})


def find_backends(device: str, wanted: list[str] | None) -> dict:
    """Name -> function; what cannot run is left out, with the reason."""
    if wanted is None:
        wanted = ['triton', 'torch', 'cuda'] if device == 'cuda' else ['reference', 'torch', 'cpp']
    found, statuses = {}, available_backends()
    for name in wanted:
        if name == 'cuda':
            try:
                from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
            except Exception as error:  # a build for another torch fails in many ways
                print(f'the CUDA kernel of mamba_ssm is not timed: {error}')
            else:
                found[name] = selective_scan_fn
        elif name not in statuses:
            raise SystemExit(f"--backends got '{name}', expected {', '.join(statuses)} or cuda")
        elif statuses[name].usable:
            found[name] = lambda name=name, **x: selective_scan(**x, backend=name)
        else:
            print(f'{name} is not timed: {statuses[name].reason}')
    return found


def run(function, inputs: dict, backward: bool):
    """One call, and its gradients when asked for."""
    with torch.set_grad_enabled(backward):
        y = function(**inputs, delta_softplus=True)
    if not backward:
        return y, ()
    return y, torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))


def exact_results(inputs: dict):
    """y and all gradients of a float64 scan."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return run(lambda **x: selective_scan(**x, backend='torch'), exact, True)


def errors(function, inputs: dict, exact) -> dict[str, float]:
    """Errors of y and of every gradient against `exact_results`."""
    y_exact, exact_grads = exact
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, grads = run(function, leaves, True)
    named = {'y': relative_rms(y.detach(), y_exact.detach())}
    for name, got, expected in zip(inputs, grads, exact_grads, strict=True):
        named[name] = relative_rms(got, expected)
    return named


def saved_megabytes(function, inputs: dict) -> float:
    """What a call keeps for its backward pass on the GPU, beyond inputs and output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = function(**inputs, delta_softplus=True)
    return (torch.cuda.memory_allocated() - before - y.numel() * y.element_size()) / 2**20


def measure(shape: Shape, functions: dict, args, failures: Failures) -> Iterator[dict]:
    """The rows of one shape, each as soon as it is known."""
    dtype = getattr(torch, args.dtype)
    common = environment(args.device, args.clock) | {
        'shape': shape.name, 'B': shape.batch, 'L': shape.length, 'D': shape.channels,
        'N': shape.state, 'dtype': args.dtype,
        # whether L fills the chunks of the CUDA kernel
        'even': shape.length % 2048 == 0 or shape.length in (128, 256, 512, 1024),
    }
    size = (3 + shape.gate) * shape.batch * shape.length * shape.channels * dtype.itemsize
    inputs, of_backend = {}, {}
    exact = exact_results(make_inputs(shape, dtype, args.device, 0, True))
    for name, function in functions.items():
        token_major = args.device == 'cuda' and name != 'cuda'
        row = common | {'backend': name, 'layout': 'token' if token_major else 'channel'}
        found = None
        with failures.noted(f'{shape.name}: {name}'):
            sets = [make_inputs(shape, dtype, args.device, seed, token_major)
                    for seed in range(input_sets(size, args.device))]
            found = errors(function, sets[0], exact)
        if found is None:
            yield row | {'mode': FAILED}
            continue
        error_y = found.pop('y')
        worst = max(found, key=found.get)
        row |= {'error_y': f'{error_y:.1e}', 'worst_gradient': worst,
                'error_gradient': f'{found[worst]:.1e}'}
        if max(error_y, found[worst]) <= TOLERANCE[dtype] * (1 if name == 'triton' else 4):
            inputs[name], of_backend[name] = sets, row
        else:
            yield row | {'mode': WRONG}
    del exact
    for what in args.passes:
        backward = what == PASSES[1]
        calls = {}
        for name, sets in inputs.items():
            leaves = [{k: x.detach().requires_grad_(backward) for k, x in one.items()}
                      for one in sets]
            calls[name] = [
                lambda x=x, f=functions[name], b=backward: run(f, x, b) for x in leaves
            ]
            if backward and args.device == 'cuda':
                with failures.noted(f'{shape.name}: {name}: memory'):
                    saved = saved_megabytes(functions[name], leaves[0])
                    of_backend[name]['saved_MB'] = f'{saved:.2f}'
        floor = floor_ms(shape, dtype, backward, common['device'])
        for mode in args.modes:
            build = in_sequence if mode == 'eager' else as_graph
            timed = {}
            for name, own in calls.items():
                if mode == 'graph' and name not in ('triton', 'cuda'):
                    continue  # a graph of the thousands of launches of the others is no use
                with failures.noted(f'{shape.name}: {name}: {what}, {mode}'):
                    work = build(own)
                    seconds_per_call(work, args.clock)  # compiles, and fills caches
                    timed[name] = work
            times = take_turns(timed, args.rounds, args.clock, args.seconds)
            stamps = {name: percentiles(values) for name, values in times.items()}
            for name, stamp in stamps.items():
                ratios = {
                    f'{anchor}_over_this':
                        f"{float(stamps[anchor]['p50_ms']) / float(stamp['p50_ms']):.2f}"
                    for anchor in ('reference', 'cuda') if anchor in stamps
                }
                yield of_backend[name] | stamp | ratios | {
                    'pass': what, 'mode': mode, 'floor_ms': '' if floor is None else f'{floor:.4f}',
                }


def show(row: dict) -> str:
    """A row in one line, without what all rows share."""
    shown = ('shape', 'backend', 'pass', 'mode', 'p50_ms', 'floor_ms', 'reference_over_this',
             'cuda_over_this', 'saved_MB', 'error_y', 'worst_gradient', 'error_gradient')
    return '  '.join(f'{key} {row[key]}' for key in shown if row.get(key))


def parse_args(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', choices=['cuda', 'cpu'], default=here)
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'],
                        help='default: bfloat16 on a GPU, float32 on a CPU')
    parser.add_argument('--shape', action='append', metavar='B,L,D,N', help='may be repeated')
    parser.add_argument('--small', action='store_true', help='two small shapes, to try the script')
    parser.add_argument('--only', metavar='REGEX', default='', help='shapes whose name matches')
    parser.add_argument('--backends', type=lambda x: x.split(','), help='comma-separated')
    parser.add_argument('--passes', choices=PASSES, nargs='+', default=PASSES)
    parser.add_argument('--rounds', type=int, default=20, help='turns per backend (default: 20)')
    parser.add_argument('--seconds', type=float, default=5, metavar='S',
                        help='no further turn after these of one measurement (default: 5)')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='begin no further shape after these')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument('--clock', choices=CLOCKS, help='default: cuda on a GPU, wall on a CPU')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    parser.add_argument('--plot', metavar='PATH', help='draw the times, such as scan.png')
    parser.add_argument('--require', action='append', default=[], metavar='BACKEND=RATIO',
                        help='fail when BACKEND is not RATIO times as fast as the anchor')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; use --device cpu')
    args.dtype = args.dtype or {'cuda': 'bfloat16', 'cpu': 'float32'}[args.device]
    args.clock = args.clock or default_clock(args.device)
    if (args.clock == 'cuda') != (args.device == 'cuda'):
        parser.error(f'--clock {args.clock} does not measure --device {args.device}')
    args.modes = ('eager', 'graph') if args.device == 'cuda' else ('eager',)
    args.require = {name: float(ratio) for name, ratio in (r.split('=') for r in args.require)}
    return args


def main(arguments=None) -> int:
    """Print the rows and keep them; return 1 when a backend is wrong or too slow."""
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    shapes = SMALL if args.small else GPU_SHAPES if args.device == 'cuda' else CPU_SHAPES
    if args.shape:
        shapes = [Shape(text, *map(int, text.split(','))) for text in args.shape]
    functions = find_backends(args.device, args.backends)
    if not set(args.require) <= set(functions):
        raise SystemExit(f'--require names {sorted(args.require)}, but timed are {[*functions]}')
    anchor = 'cuda_over_this' if args.device == 'cuda' else 'reference_over_this'
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    everything, failed, failures = [], False, Failures()
    limit = TimeLimit(args.minutes)
    for shape in shapes:
        if not re.search(args.only, shape.name) or limit.passed(shape.name):
            continue
        with failures.noted(shape.name):
            for row in measure(shape, functions, args, failures):
                late = float(row.get(anchor) or 'inf') < args.require.get(row['backend'], 0)
                failed |= late or row['mode'] == WRONG
                print(show(row) + ('  TOO SLOW' if late else ''), flush=True)
                if args.csv:
                    append_rows(args.csv, COLUMNS, [row])
                everything.append(row)
    if args.plot and everything:
        plot_rows(args.plot, everything, 'backend', f'Selective scan, {args.dtype}')
    return int(failed or bool(failures))


if __name__ == '__main__':
    sys.exit(main())
