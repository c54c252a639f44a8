"""Time the backends of the selective scan against the sequential reference, in turns.

    python tools/benchmark/ops.py                      # the shapes of the README, forward
    python tools/benchmark/ops.py --backward --shape 2,256,128,8 --backends reference,torch

Backends take turns (A B A B) within one process, so that a change of the machine's load hits all
of them; the table gives medians. With --require the exit code is 1 when a backend is too slow.
"""

import argparse
import statistics
import sys
import time

import torch

from mmhybrid.ops import available_backends, selective_scan

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


def run_once(inputs: dict, backend: str, backward: bool) -> tuple[float, torch.Tensor]:
    """Seconds of one call, with its backward pass if asked for, and the output."""
    inputs = {name: x.detach().requires_grad_(backward) for name, x in inputs.items()}
    on_gpu = inputs['u'].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
        if backward:
            y.backward(torch.ones_like(y))
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, y.detach()


def main() -> int:
    """Print the table; return 1 when a requirement is missed or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', action='append', metavar='B,L,D,N', help='may be repeated')
    parser.add_argument('--backends', help='comma-separated; default: all that are usable')
    parser.add_argument('--backward', action='store_true', help='time both passes together')
    parser.add_argument('--rounds', type=int, default=5, help='turns per backend (default: 5)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument('--device', default='cpu')
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

    what = 'forward+backward' if args.backward else 'forward'
    print(f'selective_scan {what}, float32, {args.device}, torch {torch.__version__}, '
          f'{args.threads} threads, median of {args.rounds} turns')
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
                times[name].append(run_once(inputs, name, args.backward)[0])
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        row = f'{str(shape):<22}'
        for name in backends:
            ratio = medians['reference'] / medians[name]
            missed = ratio < required.get(name, 0)
            failed |= missed
            row += f'{medians[name]:>16.2f}{ratio:>7.1f}{"!" if missed else "x"}'
        print(row, flush=True)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
