"""Time the backends of the selective scan against the sequential reference, in turns.

    python tools/benchmark/ops.py                      # the shapes of the README, forward
    python tools/benchmark/ops.py --backward --shape 2,256,128,8 --backends reference,torch

Backends take turns (A B A B) within one process, so that a change of the machine's load hits all
of them; the table gives medians. With --require the exit code is 1 when a backend is too slow.
--clock cpu counts the process's own CPU time: use it with --threads 1 on a machine that others use.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmhybrid.ops import available_backends, selective_scan

CSV_COLUMNS = (
    'device', 'torch', 'commit', 'clock', 'threads', 'pass', 'B', 'L', 'D', 'N', 'dtype', 'backend',
    'turns', 'p20_ms', 'p50_ms', 'p80_ms', 'reference_over_this',
)  # fmt: skip
SHAPES = ((2, 4096, 160, 8), (1, 12544, 160, 8), (64, 196, 160, 8), (64, 49, 320, 8))


def make_inputs(shape: tuple[int, int, int, int], device: str) -> dict[str, torch.Tensor]:
    """Inputs of (B, L, D, N) with steps and decay rates like those of a trained mixer."""
    batch, length, channels, state = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device)

    return {
        'u': normal(batch, channels, length),
        'delta': normal(batch, channels, length) - 3,
        'A': -torch.arange(1.0, state + 1, device=device).repeat(channels, 1),
        'B': normal(batch, state, length),
        'C': normal(batch, state, length),
        'D': torch.ones(channels, device=device),
        'delta_bias': normal(channels),
    }


CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def run_once(
    inputs: dict, backend: str, backward: bool, clock=time.perf_counter
) -> tuple[float, torch.Tensor]:
    """Seconds of one call, with its backward pass if asked for, and the output."""
    inputs = {name: x.detach().requires_grad_(backward) for name, x in inputs.items()}
    on_gpu = inputs['u'].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    with torch.set_grad_enabled(backward):
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
        if backward:
            y.backward(torch.ones_like(y))
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start, y.detach()


def processor() -> str:
    """Name of the GPU or CPU, for the record."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(x.split(':', 1)[1].strip() for x in lines if x.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Short name of the commit that is measured."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty']
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or 'unknown'


def write_rows(args, shape, what, times) -> None:
    """Append one row per backend: where, what, and the 20th, 50th and 80th percentile in ms."""
    path = Path(args.csv)
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    device = processor() if args.device == 'cpu' else torch.cuda.get_device_name()
    medians = {name: statistics.median(values) for name, values in times.items()}
    with open(path, 'a', newline='') as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(CSV_COLUMNS)
        for name, values in times.items():
            cuts = statistics.quantiles(values, n=10, method='inclusive')
            percentiles = (f'{cuts[i] * 1e3:.3f}' for i in (1, 4, 7))
            ratio = f"{medians['reference'] / medians[name]:.2f}"
            writer.writerow([device, torch.__version__, commit(), args.clock, args.threads, what,
                             *shape, 'float32', name, len(values), *percentiles, ratio])


def main() -> int:
    """Print the table; return 1 when a requirement is missed or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', action='append', metavar='B,L,D,N', help='may be repeated')
    parser.add_argument('--backends', help='comma-separated; default: all that are usable')
    parser.add_argument('--backward', action='store_true', help='time both passes together')
    parser.add_argument('--rounds', type=int, default=5, help='turns per backend (default: 5)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--clock', choices=CLOCKS, default='wall')
    parser.add_argument('--csv', metavar='PATH', help='append the results to this file')
    parser.add_argument('--require', action='append', default=[], metavar='BACKEND=RATIO',
                        help='fail when BACKEND is not RATIO times as fast as the reference')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split(','))) for s in args.shape] if args.shape else SHAPES
    usable = [name for name, status in available_backends().items() if status.usable]
    backends = args.backends.split(',') if args.backends else usable
    backends = ['reference', *(name for name in backends if name != 'reference')]
    required = {name: float(ratio) for name, ratio in (r.split('=') for r in args.require)}
    if not set(required) <= set(backends):
        parser.error(f'--require names {sorted(required)}, but only {backends} are timed.')

    clock = CLOCKS[args.clock]
    what = 'forward+backward' if args.backward else 'forward'
    print(f'selective_scan {what}, float32, {args.device}, torch {torch.__version__}, '
          f'{args.threads} threads, {args.clock} clock, median of {args.rounds} turns')
    print(f"{'(B, L, D, N)':<22}" + ''.join(f'{name + " ms":>16}{"ratio":>8}' for name in backends))
    failed = False
    for shape in shapes:
        inputs = make_inputs(shape, args.device)
        times: dict[str, list[float]] = {name: [] for name in backends}
        expected = run_once(inputs, 'reference', False)[1]
        for name in backends[1:]:  # also warms up; a wrong result is not worth timing
            error = (run_once(inputs, name, args.backward)[1] - expected).abs().max().item()
            if error > 1e-4 * expected.abs().max().item():
                print(f'{name} is wrong at {shape}: largest difference {error:.2e}')
                return 1
        for _ in range(args.rounds):
            for name in backends:
                times[name].append(run_once(inputs, name, args.backward, clock)[0])
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        row = f'{str(shape):<22}'
        for name in backends:
            ratio = medians['reference'] / medians[name]
            missed = ratio < required.get(name, 0)
            failed |= missed
            row += f'{medians[name]:>16.2f}{ratio:>7.1f}{"!" if missed else "x"}'
        print(row, flush=True)
        if args.csv:
            write_rows(args, shape, what, times)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
