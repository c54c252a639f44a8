"""Time MambaVision's mixer in turns: fused, and as ordinary layers around each scan.

    python tools/benchmark/mixer.py --csv tools/benchmark/results/mixer_gpu.csv --plot mixer.png
    python tools/benchmark/mixer.py --only 'detection.*s3' --dtype float16
    python tools/benchmark/mixer.py --device cpu --clock cpu --threads 1

Takes a GPU if there is one, and trains as the recipes do: float32 parameters, autocast to --dtype
(--pure for parameters of that dtype). Every variant is first compared with the plain mixer in
float64, gradients included; one that is wrong is reported and not timed, one that raises is
reported and left out. Rows are written as they are measured, and --minutes limits the run. On a GPU
the anchor is the plain mixer around the CUDA scan of mamba_ssm, when that can be imported; on a
CPU, the plain mixer around the sequential reference. Beside the times: the floor, and what a call
keeps for its backward pass in bytes per token and channel.
"""

import argparse
import copy
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
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
    in_sequence,
    input_sets,
    percentiles,
    plot_rows,
    relative_rms,
    saved_bytes,
    seconds_per_call,
    take_turns,
)

from mmhybrid.layers import MambaVisionMixer
from mmhybrid.layers.mixers import mambavision as mixer_module
from mmhybrid.ops import available_backends


class Shape(NamedTuple):
    """A mixer of C channels on B windows of L tokens."""

    name: str
    batch: int
    length: int
    dim: int


# One size of the model comes first, so that a short run sees all kinds of shapes.
GPU_SHAPES = tuple(
    Shape(f'{task} MambaVision-{model} s{stage}', batch, length, dim * 2 ** (stage - 3))
    for model, dim in (('T', 320), ('S', 384), ('B', 512))
    for task, stage, batch, length in (
        ('detection', 3, 2, 12544), ('detection', 4, 2, 3136),
        ('segmentation', 3, 2, 4096), ('segmentation', 4, 2, 1024),
        ('classification', 3, 128, 196), ('classification', 4, 128, 49))
) + (Shape('segmentation MambaVision-S s3 window 160', 2, 25600, 384),)
CPU_SHAPES = (
    Shape('segmentation MambaVision-T s4', 2, 1024, 640),
    Shape('classification MambaVision-T s3', 8, 196, 320),
)
SMALL = (Shape('even', 2, 64, 32), Shape('uneven', 1, 37, 40))

COLUMNS = (
    *ENVIRONMENT, 'shape', 'B', 'L', 'C', 'dtype', 'parameters', 'variant', 'pass', 'mode',
    *PERCENTILES, 'floor_ms', 'anchor', 'anchor_over_this', 'saved_bytes_per_token_and_channel',
    'error_y', 'worst_gradient', 'error_gradient',
)
PASSES = ('forward', 'forward+backward')
WRONG = 'wrong, not timed'
FAILED = 'failed, not timed'

# Of GPUs whose floor is known: bytes, exponentials and 16-bit tensor-core operations per second.
RATES = {'H200': (4.3e12, 4.18e12, 989e12)}
# RMS error against float64 beyond which nothing is timed: the roundings of seven tensors in a row.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def floor_ms(shape: Shape, dtype: torch.dtype, backward: bool, device: str) -> float | None:
    """Lower bound for any mixer: tokens in and out once, exponentials, or matrix products."""
    rates = next((rates for name, rates in RATES.items() if name in device), None)
    if rates is None or dtype == torch.float32:
        return None
    tokens, dim, state = shape.batch * shape.length, shape.dim, 8
    half, rank = dim // 2, -(-dim // 16)
    # A product forward is two of its size backward; the backward pass reads x again and dy, and
    # writes dx. Two exponentials for softplus, two each for SiLU (and again for its derivative).
    passes = 3 if backward else 1
    work = (
        (5 if backward else 2) * tokens * dim * dtype.itemsize,
        (2 if backward else 1) * tokens * half * (state + 2 + 4),
        2 * passes * tokens * (2 * dim * dim + half * (rank + 2 * state) + half * rank),
    )
    return max(amount / rate for amount, rate in zip(work, rates, strict=True)) * 1e3


def cuda_scan():
    """The CUDA scan of mamba_ssm as the mixer calls a scan; None, and why, when it is missing."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # a build for another torch fails in many ways
        print(f'the plain mixer with the CUDA kernel of mamba_ssm is not timed: {error}')
        return None

    def scan(*inputs, D, delta_bias, backend, **more):
        # The kernel takes these two in float32 only.
        return selective_scan_fn(*inputs, D=D.float(), delta_bias=delta_bias.float(), **more)

    return scan


class OtherScan(torch.nn.Module):
    """A plain mixer around another scan than those of mmhybrid."""

    def __init__(self, mixer: MambaVisionMixer, scan):
        super().__init__()
        self.mixer = mixer
        self.scan = scan

    def forward(self, x):
        """Run the mixer with its module's scan replaced."""
        own, mixer_module.selective_scan = mixer_module.selective_scan, self.scan
        try:
            return self.mixer(x)
        finally:
            mixer_module.selective_scan = own


def make_mixer(dim: int, device: str) -> MambaVisionMixer:
    """A plain mixer with filters, steps and decay rates like those of a trained one."""
    torch.manual_seed(0)
    mixer = MambaVisionMixer(dim, backend='torch', fused=False)
    with torch.no_grad():
        for layer in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
            layer.weight.normal_(std=layer.weight.shape[1] ** -0.5)
    return mixer.to(device)


def find_variants(source: MambaVisionMixer, device: str, wanted: list[str] | None) -> dict:
    """Name -> module with the source's weights; what cannot run is left out, with the reason."""
    if wanted is None:
        plain = ['cuda', 'triton', 'torch'] if device == 'cuda' else ['reference', 'torch', 'cpp']
        wanted = [f'plain {name}' for name in plain] + ['fused', 'fused lean'] * (device == 'cuda')
    found, statuses = {}, available_backends()
    for name in wanted:
        kind, _, scan = name.partition(' ')
        mixer = copy.deepcopy(source)
        if kind == 'fused' and scan in ('', 'lean'):
            mixer.fused, mixer.backend, mixer.lean = True, 'auto', scan == 'lean'
            try:
                mixer.path(next(mixer.parameters()))
            except RuntimeError as error:
                print(f'{name} is not timed: {error}')
                continue
        elif name == 'plain cuda':
            other = cuda_scan()
            if other is None:
                continue
            mixer = OtherScan(mixer, other)
        elif kind == 'plain' and scan in statuses:
            if not statuses[scan].usable:
                print(f'{name} is not timed: {statuses[scan].reason}')
                continue
            mixer.backend = scan
        else:
            raise SystemExit(f"--variants got '{name}', expected 'fused', 'fused lean', 'plain "
                             f"cuda' or 'plain' and one of {', '.join(statuses)}")
        found[name] = mixer
    return found


def run(mixer, x, backward: bool, autocast: torch.dtype | None = None):
    """One call, and the gradients of x and of all parameters when asked for."""
    with torch.set_grad_enabled(backward), \
            torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = mixer(x)
    if not backward:
        return y, ()
    return y, torch.autograd.grad(y, [x, *mixer.parameters()], torch.ones_like(y))


def errors(mixer, exact, x, autocast) -> dict[str, float]:
    """Errors of y and of every gradient against those of the float64 mixer."""
    y_exact, expected = exact
    y, got = run(mixer, x.detach().requires_grad_(), True, autocast)
    names = ['x', *(name.removeprefix('mixer.') for name, _ in mixer.named_parameters())]
    named = {'y': relative_rms(y.detach(), y_exact.detach())}
    for name, g, e in zip(names, got, expected, strict=True):
        named[name] = relative_rms(g, e)
    return named


def measure(shape: Shape, args, failures: Failures) -> Iterator[dict]:
    """The rows of one shape, each as soon as it is known."""
    dtype = getattr(torch, args.dtype)
    autocast = None if args.pure or dtype == torch.float32 else dtype
    held = torch.float32 if autocast else dtype
    source = make_mixer(shape.dim, args.device)
    common = environment(args.device, args.clock) | {
        'shape': shape.name, 'B': shape.batch, 'L': shape.length, 'C': shape.dim,
        'dtype': args.dtype, 'parameters': str(held).removeprefix('torch.'),
    }
    elements = shape.batch * shape.length * shape.dim
    generator = torch.Generator(args.device).manual_seed(1)
    sets = [torch.randn(shape[1:], generator=generator, device=args.device).to(held)
            for _ in range(input_sets(elements * dtype.itemsize, args.device))]
    # The float64 mixer has the weights as they are held, rounded or not.
    variants = find_variants(source.to(held), args.device, args.variants)
    exact = run(copy.deepcopy(source).double(), sets[0].double().requires_grad_(), True)
    of_variant = {}
    for name, mixer in variants.items():
        row = common | {'variant': name}
        found = None
        with failures.noted(f'{shape.name}: {name}'):
            found = errors(mixer, exact, sets[0], autocast)
            x = sets[0].detach().requires_grad_()
            kept = saved_bytes(lambda m=mixer, x=x: run_forward(m, x, autocast), mixer.parameters())
            row['saved_bytes_per_token_and_channel'] = f'{kept / elements:.2f}'
        if found is None:
            yield row | {'mode': FAILED}
            continue
        error_y = found.pop('y')
        worst = max(found, key=found.get)
        row |= {'error_y': f'{error_y:.1e}', 'worst_gradient': worst,
                'error_gradient': f'{found[worst]:.1e}'}
        if max(error_y, found[worst]) <= TOLERANCE[dtype]:
            of_variant[name] = row
        else:
            yield row | {'mode': WRONG}
    del exact
    anchor = next((x for x in ('plain cuda', 'plain reference') if x in of_variant), '')
    for what in args.passes:
        backward = what == PASSES[1]
        leaves = [x.detach().requires_grad_(backward) for x in sets]
        floor = floor_ms(shape, dtype, backward, common['device'])
        for mode in args.modes:
            build = in_sequence if mode == 'eager' else as_graph
            works = {}
            for name in of_variant:
                if mode == 'graph' and name in ('plain torch', 'plain reference'):
                    continue  # a graph of the thousands of launches of these is no use
                with failures.noted(f'{shape.name}: {name}: {what}, {mode}'):
                    work = build([lambda m=variants[name], x=x, b=backward: run(m, x, b, autocast)
                                  for x in leaves])
                    seconds_per_call(work, args.clock)  # compiles, and fills caches
                    works[name] = work
            times = take_turns(works, args.rounds, args.clock, args.seconds)
            stamps = {name: percentiles(values) for name, values in times.items()}
            for name, stamp in stamps.items():
                ratio = {}
                if anchor in stamps:
                    over = float(stamps[anchor]['p50_ms']) / float(stamp['p50_ms'])
                    ratio = {'anchor': anchor, 'anchor_over_this': f'{over:.2f}'}
                yield of_variant[name] | stamp | ratio | {
                    'pass': what, 'mode': mode, 'floor_ms': '' if floor is None else f'{floor:.4f}',
                }


def run_forward(mixer, x, autocast):
    """A forward pass whose output can be differentiated."""
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        return mixer(x)


def show(row: dict) -> str:
    """A row in one line, without what all rows share."""
    shown = ('shape', 'variant', 'pass', 'mode', 'p50_ms', 'floor_ms', 'anchor_over_this',
             'saved_bytes_per_token_and_channel', 'error_y', 'worst_gradient', 'error_gradient')
    return '  '.join(f'{key} {row[key]}' for key in shown if row.get(key))


def parse_args(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=20, seconds=5)
    parser.add_argument('--pure', action='store_true',
                        help='parameters and input of --dtype instead of autocast')
    parser.add_argument('--variants', type=lambda x: x.split(','),
                        help="comma-separated, such as 'fused,plain torch'")
    parser.add_argument('--passes', choices=PASSES, nargs='+', default=PASSES)
    parser.add_argument('--plot', metavar='PATH', help='draw the times, such as mixer.png')
    args = parser.parse_args(arguments)
    complete_options(parser, args)
    return args


def main(arguments=None) -> int:
    """Print the rows and keep them; return 1 when a variant is wrong."""
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    everything, failures, limit = [], Failures(), TimeLimit(args.minutes)
    for shape in SMALL if args.small else GPU_SHAPES if args.device == 'cuda' else CPU_SHAPES:
        if not re.search(args.only, shape.name) or limit.passed(shape.name):
            continue
        with failures.noted(shape.name):
            for row in measure(shape, args, failures):
                print(show(row), flush=True)
                if args.csv:
                    append_rows(args.csv, COLUMNS, [row])
                everything.append(row)
    if args.plot and everything:
        plot_rows(args.plot, everything, 'variant', f"MambaVision's mixer, {args.dtype}")
    return int(bool(failures) or any(row['mode'] == WRONG for row in everything))


if __name__ == '__main__':
    sys.exit(main())
