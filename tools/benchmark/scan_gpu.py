"""Time the scan on a GPU: eager and as a CUDA graph, beside its floor and the CUDA kernel.

    python tools/benchmark/scan_gpu.py --csv tools/benchmark/results/scan_gpu.csv
    python tools/benchmark/scan_gpu.py --only 'seg|VMamba' --dtype float16

Every result is compared with a float64 scan first, gradients included; a backend that is wrong is
reported and not timed. Anchors in the same run: the CUDA scan of mamba_ssm when it can be imported,
and the PyTorch path. Calls rotate over copies of their inputs that together exceed the cache. On a
machine without a GPU the script runs end to end on small shapes with --device cpu (a check of the
script; such times say nothing about a GPU and are not written to the CSV).
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from mmhybrid.ops import available_backends, selective_scan


class Shape(NamedTuple):
    """One call: B sequences of L tokens, D channels, N states, and whether it has a gate."""

    name: str
    batch: int
    length: int
    channels: int
    state: int
    gate: bool = False


SHAPES = (
    *(Shape(f'detection MambaVision-{m} s3', 2, 12544, d, 8) for m, d in
      (('T', 160), ('S', 192), ('B', 256))),
    *(Shape(f'detection MambaVision-{m} s4', 2, 3136, d, 8) for m, d in
      (('T', 320), ('S', 384), ('B', 512))),
    *(Shape(f'segmentation MambaVision-{m} s3', 2, 4096, d, 8) for m, d in
      (('T', 160), ('S', 192), ('B', 256))),
    *(Shape(f'segmentation MambaVision-{m} s4', 2, 1024, d, 8) for m, d in
      (('T', 320), ('S', 384), ('B', 512))),
    Shape('segmentation MambaVision-S s3 window 160', 2, 25600, 192, 8),
    *(Shape(f'classification MambaVision-{m} s3', 128, 196, d, 8) for m, d in
      (('T', 160), ('S', 192), ('B', 256))),
    *(Shape(f'classification MambaVision-{m} s4', 128, 49, d, 8) for m, d in
      (('T', 320), ('S', 384), ('B', 512))),
    *(Shape(f'VMamba-T 512 stage {i + 1}', 2, 16384 >> 2 * i, 384 << i, 1) for i in range(4)),
    Shape('Vim-S 1248 one direction', 1, 6085, 768, 16, gate=True),
)  # fmt: skip
SMALL = (Shape('even', 2, 64, 32, 8), Shape('uneven', 1, 37, 40, 1, gate=True))

COLUMNS = (
    'gpu', 'torch', 'triton', 'commit', 'shape', 'B', 'L', 'D', 'N', 'even', 'dtype', 'pass',
    'mode', 'backend', 'calls', 'p20_us', 'p50_us', 'p80_us', 'floor_us', 'cuda_over_this',
    'saved_MB', 'error_y', 'worst_gradient', 'error_gradient',
)  # fmt: skip

# Bytes, exponentials and float32 operations per second of GPUs whose floor is known.
RATES = {'H200': (4.3e12, 4.18e12, 33.4e12)}
# RMS error against float64 beyond which nothing is timed: two roundings to the stored dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CACHE_BYTES = 128 << 20


def floor_us(shape: Shape, dtype: torch.dtype, backward: bool, gpu: str) -> float | None:
    """Lower bound of forward, or forward plus backward: traffic, exponentials or arithmetic."""
    rates = next((rates for name, rates in RATES.items() if name in gpu), None)
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
        return max(amount / rate for amount, rate in zip(work, rates, strict=True)) * 1e6

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


def backends(device: str) -> dict:
    """Name -> (function, whether it wants token-major inputs); what cannot run is left out."""
    found = {}
    for name in ('triton', 'torch') if device == 'cuda' else ('torch', 'cpp'):
        status = available_backends()[name]
        if status.usable:
            found[name] = (lambda name=name, **x: selective_scan(**x, backend=name), True)
        else:
            print(f'{name} is not timed: {status.reason}')
    if device == 'cuda':
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            found['cuda'] = (selective_scan_fn, False)
        except ImportError as error:
            print(f'the CUDA kernel of mamba_ssm is not timed: {error}')
    return found


def run(function, inputs: dict, backward: bool):
    """One call, and its gradients when asked for."""
    y = function(**inputs, delta_softplus=True)
    if not backward:
        return y, ()
    return y, torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the error over RMS of the reference."""
    error = (got.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt()).item()


def errors(function, inputs: dict) -> dict[str, float]:
    """Errors of y and of every gradient against a float64 scan."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y_exact, exact_grads = run(lambda **x: selective_scan(**x, backend='torch'), exact, True)
    y, grads = run(function, leaves, True)
    named = {'y': relative_rms(y.detach(), y_exact.detach())}
    for name, got, expected in zip(inputs, grads, exact_grads, strict=True):
        named[name] = relative_rms(got, expected)
    return named


def saved_megabytes(function, inputs: dict) -> float:
    """What a call keeps for its backward pass, beyond inputs and output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = function(**inputs, delta_softplus=True)
    return (torch.cuda.memory_allocated() - before - y.numel() * y.element_size()) / 2**20


def time_eager(calls: list, rounds: int, device: str) -> list[float]:
    """Microseconds per call, one figure per round over all copies of the inputs."""
    times = []
    for _ in range(rounds):
        if device == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for call in calls:
                call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
        else:
            begin = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - begin) * 1e6 / len(calls))
    return times


def time_graph(calls: list, rounds: int) -> list[float]:
    """Microseconds per call when the GPU replays them without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [t / len(calls) for t in time_eager([graph.replay], rounds, 'cuda')]


def commit() -> str:
    """Short name of the commit that is measured."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty']
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or 'unknown'


def measure(shape: Shape, dtype: torch.dtype, device: str, rounds: int) -> list[dict]:
    """All rows of one shape."""
    gpu = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
    triton = sys.modules.get('triton')
    fixed = {
        'gpu': gpu, 'torch': torch.__version__, 'triton': getattr(triton, '__version__', ''),
        'commit': commit(), 'shape': shape.name, 'B': shape.batch, 'L': shape.length,
        'D': shape.channels, 'N': shape.state, 'even': shape.length % 2048 == 0
        or shape.length in (128, 256, 512, 1024), 'dtype': str(dtype).removeprefix('torch.'),
    }  # fmt: skip
    tensors = 3 + shape.gate
    size = tensors * shape.batch * shape.length * shape.channels * dtype.itemsize
    copies = min(16, max(2, -(-CACHE_BYTES // size))) if device == 'cuda' else 1
    rows = []
    for name, (function, token_major) in backends(device).items():
        sets = [make_inputs(shape, dtype, device, seed, token_major) for seed in range(copies)]
        found = errors(function, sets[0])
        error_y = found.pop('y')
        worst = max(found, key=found.get)
        gate = {'error_y': f'{error_y:.1e}', 'worst_gradient': worst,
                'error_gradient': f'{found[worst]:.1e}', 'backend': name}  # fmt: skip
        if not max(error_y, found[worst]) <= TOLERANCE[dtype] * (1 if name == 'triton' else 4):
            print(f'{shape.name}: {name} is wrong (y {error_y:.1e}, {worst} {found[worst]:.1e})')
            rows.append(fixed | gate | {'mode': 'wrong, not timed'})
            continue
        for backward in (False, True):
            leaves = [{k: x.requires_grad_(backward) for k, x in one.items()} for one in sets]
            calls = [lambda x=x, f=function, b=backward: run(f, x, b) for x in leaves]
            what = 'forward+backward' if backward else 'forward'
            extra = {'pass': what, 'calls': rounds * copies}
            floor = floor_us(shape, dtype, backward, gpu)
            extra['floor_us'] = '' if floor is None else f'{floor:.1f}'
            if device == 'cuda' and backward:
                extra['saved_MB'] = f'{saved_megabytes(function, leaves[0]):.2f}'
            time_eager(calls, 2, device)  # compiles and warms up
            modes = {'eager': lambda calls=calls: time_eager(calls, rounds, device)}
            if device == 'cuda' and name != 'torch':  # thousands of launches make no graph
                modes['graph'] = lambda calls=calls: time_graph(calls, rounds)
            for mode, timer in modes.items():
                with torch.set_grad_enabled(backward):
                    cuts = statistics.quantiles(timer(), n=10, method='inclusive')
                rows.append(fixed | gate | extra | {'mode': mode} | {
                    f'p{p}_us': f'{cuts[p // 10 - 1]:.1f}' for p in (20, 50, 80)})  # fmt: skip
    anchors = {(r['pass'], r['mode']): r for r in rows if r['backend'] == 'cuda' and 'p50_us' in r}
    for row in rows:
        anchor = anchors.get((row.get('pass'), row['mode']))
        if anchor and 'p50_us' in row:
            row['cuda_over_this'] = f"{float(anchor['p50_us']) / float(row['p50_us']):.2f}"
    return rows


def main() -> int:
    """Print a table and append to the CSV; return 1 when a backend is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    parser.add_argument('--only', metavar='REGEX', default='', help='shapes whose name matches')
    parser.add_argument('--rounds', type=int, default=20, help='timed rounds (default: 20)')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; --device cpu checks the script on small shapes.')
    if args.device == 'cpu' and args.csv:
        parser.error('--csv is for times of a GPU; drop it with --device cpu.')

    wrong = False
    shapes = SHAPES if args.device == 'cuda' else SMALL
    for shape in shapes:
        if not re.search(args.only, shape.name):
            continue
        rows = measure(shape, getattr(torch, args.dtype), args.device, args.rounds)
        for row in rows:
            wrong |= 'wrong' in row['mode']
            shown = ('shape', 'backend', 'pass', 'mode', 'p50_us', 'floor_us', 'cuda_over_this',
                     'saved_MB', 'error_y', 'worst_gradient', 'error_gradient')  # fmt: skip
            print('  '.join(f'{key} {row[key]}' for key in shown if row.get(key)), flush=True)
        if args.csv:
            path = Path(args.csv)
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            with open(path, 'a', newline='') as file:
                writer = csv.DictWriter(file, COLUMNS, restval='')
                if is_new:
                    writer.writeheader()
                writer.writerows(rows)
    return int(wrong)


if __name__ == '__main__':
    sys.exit(main())
