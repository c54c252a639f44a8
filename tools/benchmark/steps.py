"""Time forward passes and training steps of whole backbones: eager, with graphs, as a bare graph.

    python tools/benchmark/steps.py --csv tools/benchmark/results/steps_gpu.csv
    python tools/benchmark/steps.py --case vmamba_t_seg --ways eager
    python tools/benchmark/steps.py --device cpu --small --ways eager

The cases are those of launches.py, and a step is the same: autocast, the mean of all maps as the
loss, gradients of all parameters, no optimizer. Ways: 'eager'; 'graphs', which is what
--cuda-graphs of tools/train.py does (mmhybrid.engine.use_cuda_graphs: images are copied in, maps
and gradients out); 'graph', one CUDA graph of everything, which is the time of the GPU alone. Ways
take turns. Before anything is timed, maps and gradients of 'graphs' are compared with those of
'eager'.

official_ms is what the official backbone took for the same step, eager, in another run on the same
kind of GPU (results/official_gpu.csv); where there is such a row, official_over_this is the ratio.
"""

import argparse
import copy
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from launches import CASES
from timing import (
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    TimeLimit,
    append_rows,
    as_graph,
    default_clock,
    environment,
    in_sequence,
    percentiles,
    relative_rms,
    seconds_per_call,
    take_turns,
)

from mmhybrid.registry import MODELS

COLUMNS = (*ENVIRONMENT, 'case', 'dtype', 'pass', 'way', *PERCENTILES, 'peak_MB', 'error',
           'official_ms', 'official_over_this')
PASSES = ('forward', 'train step')
WAYS = ('eager', 'graphs', 'graph')
OFFICIAL = Path(__file__).parent / 'results' / 'official_gpu.csv'
# RMS difference of a map or gradient between 'graphs' and 'eager': the order of atomic sums.
_TOLERANCE = 2e-2


def official(device: str) -> dict[tuple[str, str], float]:
    """(case, pass) -> milliseconds of the official backbone, eager, on such a device."""
    found = {}
    with OFFICIAL.open(newline='') as stream:
        for row in csv.DictReader(stream):
            if row['device'] == device and row['mode'] == 'eager':
                model, task, *_ = row['case'].split()
                case = f'{model.replace("-", "_").lower()}_{task}'
                found[case, row['pass']] = float(row['official_ms'])
    return found


def build(case, device: str, small: bool):
    """The backbone of a case and its images."""
    torch.manual_seed(0)
    module = MODELS.build({'type': case.model, 'drop_path_rate': 0.0} | case.arguments).to(device)
    size = (1, 3, 64, 64) if small else case.size
    return module, torch.randn(size, device=device)


def step_of(module, x: torch.Tensor, what: str, dtype: torch.dtype) -> Callable[[], list]:
    """One call of a pass; it returns maps and, of a training step, gradients."""
    parameters = list(module.parameters())
    training = what != 'forward'

    def step():
        for p in parameters:
            p.grad = None
        with torch.set_grad_enabled(training):
            with torch.autocast(x.device.type, dtype):
                maps = module(x)
            if training:
                sum(y.float().mean() for y in maps).backward()
        return [y.detach() for y in maps] + [p.grad for p in parameters if p.grad is not None]

    return step


def error_of(found: list, expected: list) -> float:
    """Largest RMS error of a map or gradient that is not all zero."""
    assert len(found) == len(expected), f'{len(found)} tensors, expected {len(expected)}'
    return max(relative_rms(a, b) for a, b in zip(found, expected, strict=True) if b.any())


def graphed(module, step) -> object:
    """Let a module replay graphs, as --cuda-graphs does, and have the first one recorded."""
    from mmhybrid.engine import use_cuda_graphs

    graphs = use_cuda_graphs(module, divisor=None)
    for _ in range(4):
        step()
    return graphs


def peak_megabytes(step, device: str) -> str:
    """Of one call, above what is there before it; empty on a CPU."""
    if device != 'cuda':
        return ''
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return f'{(torch.cuda.max_memory_allocated() - before) / 2**20:.4g}'


def measure(name: str, what: str, args, failures: Failures) -> list[dict]:
    """The rows of a pass of a case."""
    case = CASES[name]
    dtype = getattr(torch, case.dtype if args.device == 'cuda' else 'bfloat16')
    source, x = build(case, args.device, args.small)
    source.train(what != 'forward')
    works, about, expected = {}, {}, None
    for way in args.ways:
        with failures.noted(f'{name}: {what}, {way}'):
            # Modules of their own: a capture fails where autograd graphs of others hold parameters.
            module = copy.deepcopy(source)
            step = step_of(module, x, what, dtype)
            about[way] = {'peak_MB': peak_megabytes(step, args.device)}
            if way == 'graphs':
                graphs = graphed(module, step)
                print(f'{name}, {what}: {graphs.report()}', flush=True)
            found = [y.clone() for y in step()]
            if way == 'eager':
                expected = found
            elif way == 'graphs' and expected is not None:
                error = error_of(found, expected)
                about[way]['error'] = f'{error:.1e}'
                assert error < _TOLERANCE, f'error {error:.1e} against the eager call'
            del found
            works[way] = (as_graph if way == 'graph' else in_sequence)([step])
            seconds_per_call(works[way], args.clock)
    times = take_turns(works, args.turns, args.clock, args.seconds)
    common = environment(args.device, args.clock) | {
        'case': name, 'dtype': str(dtype).removeprefix('torch.'), 'pass': what}
    return [common | about[way] | {'way': way} | percentiles(seconds)
            for way, seconds in times.items()]


def against(row: dict, official_ms: float | None) -> dict:
    """A row with what the official backbone took."""
    if official_ms is None:
        return row
    ratio = official_ms / float(row['p50_ms'])
    return row | {'official_ms': f'{official_ms:g}', 'official_over_this': f'{ratio:.2f}'}


def parse(arguments=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--case', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--passes', nargs='+', choices=PASSES, default=PASSES)
    parser.add_argument('--ways', nargs='+', choices=WAYS, help='default: all that can run here')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default=here)
    parser.add_argument('--small', action='store_true', help='one small image, to try the script')
    parser.add_argument('--turns', type=int, default=15, help='turns per way (default: 15)')
    parser.add_argument('--seconds', type=float, default=10, metavar='S',
                        help='no further turn after these of one pass (default: 10)')
    parser.add_argument('--minutes', type=float, metavar='M', help='begin no further case after')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    args = parser.parse_args(arguments)
    args.ways = args.ways or (WAYS if args.device == 'cuda' else WAYS[:1])
    if args.device == 'cpu' and set(args.ways) != {'eager'}:
        parser.error('--ways graphs and graph need a GPU')
    args.clock = default_clock(args.device)
    return args


def main(arguments=None) -> int:
    """Print the rows and keep them; return 1 when something failed."""
    args = parse(arguments)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    failures, limit = Failures(), TimeLimit(args.minutes)
    times = official(environment(args.device, args.clock)['device'])
    for name in args.case:
        if limit.passed(name):
            continue
        for what in args.passes:
            with failures.noted(f'{name}: {what}'):
                rows = [against(row, times.get((name, what)))
                        for row in measure(name, what, args, failures)]
                for row in rows:
                    shown = ('case', 'pass', 'way', 'p50_ms', 'peak_MB', 'error',
                             'official_over_this')
                    print('  '.join(f'{key} {row[key]}' for key in shown if row.get(key)),
                          flush=True)
                if args.csv:
                    append_rows(args.csv, COLUMNS, rows)
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
