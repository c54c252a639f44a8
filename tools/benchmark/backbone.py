"""Time whole backbones of all families, with scan backends and fused or plain mixers in turns.

    python tools/benchmark/backbone.py --size 512 512 --batch 2 --csv results/backbone.csv
    python tools/benchmark/backbone.py --models MambaVision:tiny --choices triton,triton-plain

A model is CLASS:ARCH from the registry. A choice is a scan backend, with `-plain` behind it for
MambaVision's mixers as ordinary layers around the scan. All choices share their weights and take
turns (A B A B) in one process. Before anything is timed, every choice must agree with the
sequential reference scan in float32 on a small image; one that does not is reported and not timed,
one that raises is reported and left out, and either makes the exit code 1. Rows are written as they
are measured, and --minutes limits the run.

Modes: eager; compiled (torch.compile); graph (the calls as a CUDA graph, on a GPU). Memory: what
one forward pass keeps for its backward pass, and on a GPU the peak of a whole step.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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
    percentiles,
    relative_rms,
    saved_bytes,
    seconds_per_call,
    take_turns,
)

import mmhybrid.models  # noqa: F401  (fills the registry)
from mmhybrid.ops import available_backends
from mmhybrid.registry import MODELS

COLUMNS = (
    *ENVIRONMENT, 'model', 'B', 'H', 'W', 'dtype', 'pass', 'mode', 'choice', *PERCENTILES,
    'images_per_s', 'saved_MB', 'peak_MB', 'error',
)
MODELS_OF_INTEREST = ('MambaVision:tiny', 'VMamba:tiny', 'LocalVMamba:tiny', 'Vim:tiny',
                      'LocalVim:tiny')
PASSES = ('forward', 'forward+backward')
MODES = ('eager', 'compiled', 'graph')
# RMS error of a map against the float32 reference: rounding, and rounding to the stored dtype at
# every layer.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.1, 'float16': 0.02}


def build(model: str, arguments: dict | None = None) -> torch.nn.Module:
    """Build CLASS:ARCH without stochastic depth, the same weights every time."""
    name, _, arch = model.partition(':')
    cls = MODELS.module_dict.get(name)
    if cls is None:
        raise SystemExit(f'{name} is not a backbone of the registry; try one of '
                         f'{", ".join(m.partition(":")[0] for m in MODELS_OF_INTEREST)}.')
    arguments = {'arch': arch or 'tiny', 'drop_path_rate': 0.0} | (arguments or {})
    torch.manual_seed(0)
    return cls(**arguments)


def choose(model: torch.nn.Module, choice: str) -> torch.nn.Module:
    """Set backend and fused or plain way of every mixer."""
    backend, _, plain = choice.partition('-')
    if plain not in ('', 'plain') or backend not in ('auto', *available_backends()):
        raise SystemExit(f'{choice} is not a choice: expected a backend '
                         f'({", ".join(available_backends())}), or one followed by -plain.')
    mixers = [m for m in model.modules() if hasattr(m, 'backend')]
    assert mixers, f'{type(model).__name__} has no mixer with a backend'
    fused = [m for m in mixers if hasattr(m, 'fused')]
    if plain and not fused:
        raise SystemExit(f'{choice} is not a choice for {type(model).__name__}, whose mixers go '
                         f'one way on a backend; take {backend}.')
    for mixer in mixers:
        mixer.backend = backend
    for mixer in fused:
        mixer.fused = False if plain else 'auto'
    return model


def default_choices(device: str, model: str) -> list[str]:
    """What is usable here, best first; the reference only for the correctness gate."""
    usable = [name for name, status in available_backends().items() if status.usable]
    if device == 'cuda':
        ways = ['triton', 'triton-plain'] if model.startswith('MambaVision') else ['triton']
        return [*(ways if 'triton' in usable else []), 'torch']
    return [name for name in ('cpp', 'torch') if name in usable]


def autocast(device: str, dtype: str):
    """Mixed precision, or none for float32."""
    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')


def small_image(device: str, side: int) -> torch.Tensor:
    """The input of the correctness gate."""
    x = torch.randn(1, 3, side, side + 16, generator=torch.Generator().manual_seed(1))
    return x.to(device)


@torch.no_grad()
def error_of(model, choice, expected, device: str, dtype: str, side: int) -> float:
    """Largest RMS error of a map against those of the reference scan in float32."""
    with autocast(device, dtype):
        maps = choose(model, choice).eval()(small_image(device, side))
    return max(relative_rms(y.float(), want) for y, want in zip(maps, expected, strict=True))


def step(model, x: torch.Tensor, what: str, dtype: str) -> Callable[[], object]:
    """One call of the pass; the backward pass ends in the gradients of all parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run():
        with torch.set_grad_enabled(what != 'forward'):
            with autocast(x.device.type, dtype):
                maps = model(x)
            if what == 'forward':
                return maps
            seeds = [torch.ones_like(y) for y in maps]
            return torch.autograd.grad(maps, parameters, seeds, allow_unused=True)

    return run


def measure(args, model: str, choices: list[str], record: dict, failures: Failures,
            arguments: dict | None = None) -> Iterator[dict]:
    """The rows of one model, each as soon as it is known; a wrong choice counts as a failure."""
    device, (height, width) = args.device, args.size
    fixed = record | dict(model=model, B=args.batch, H=height, W=width, dtype=args.dtype)
    with torch.no_grad():
        reference = choose(build(model, arguments).to(device), 'reference').eval()
        expected = reference(small_image(device, args.check_size))
    del reference
    networks, errors = {}, {}
    for choice in choices:
        with failures.noted(f'{model}: {choice}'):
            network = build(model, arguments).to(device)
            error = error_of(network, choice, expected, device, args.dtype, args.check_size)
            errors[choice] = f'{error:.1e}'
            if error <= TOLERANCE[args.dtype]:
                networks[choice] = network
                continue
            failures.append(f'{model}: {choice}')
            print(f'{model}: {choice} is wrong (error {error:.1e}) and is not timed')
    x = torch.randn(args.batch, 3, height, width,
                    generator=torch.Generator().manual_seed(0)).to(device)
    for what in args.passes:
        works, memory = {}, {}
        for choice, network in networks.items():
            choose(network, choice).train(what != 'forward')
            call = step(network, x, what, args.dtype)
            with failures.noted(f'{model}: {choice}: {what}'):
                memory[choice] = memory_of(network, call, x, what, args.dtype)
            for mode in args.modes if choice in memory else ():
                if mode == 'graph' and not choice.startswith(('auto', 'triton')):
                    continue  # a graph of the thousands of launches of the others is no use
                with failures.noted(f'{model}: {choice}: {what}, {mode}'):
                    own = call
                    if mode == 'compiled':
                        own = step(torch.compile(network, backend=args.compiler), x, what,
                                   args.dtype)
                    work = (as_graph if mode == 'graph' else in_sequence)([own])
                    seconds_per_call(work, args.clock)
                    works[mode, choice] = work
        times = take_turns(works, args.turns, args.clock, args.seconds)
        for (mode, choice), seconds in times.items():
            row = fixed | {'pass': what, 'mode': mode, 'choice': choice} | percentiles(seconds)
            row['images_per_s'] = f"{args.batch / float(row['p50_ms']) * 1e3:.4g}"
            row['error'] = errors[choice]
            yield row | memory[choice]


def memory_of(network, call, x, what: str, dtype: str) -> dict[str, str]:
    """Megabytes kept for the backward pass, and on a GPU the peak of a step above its start."""
    found = {}
    if what != 'forward':
        def forward():
            with autocast(x.device.type, dtype):
                return network(x)

        kept = saved_bytes(forward, ignored=[x, *network.parameters(), *network.buffers()])
        found['saved_MB'] = f'{kept / 2**20:.4g}'
    call()  # compiles kernels, and fills the caches of libraries
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        found['peak_MB'] = f'{(torch.cuda.max_memory_allocated() - before) / 2**20:.4g}'
    return found


def plot(rows: list[dict], path: Path) -> None:
    """Medians as bars: a group per model and pass, a colour per choice and mode."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row['model'], row['pass']) for row in rows))
    kinds = list(dict.fromkeys((row['choice'], row['mode']) for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(6, 1.6 * len(groups)), 4), layout='constrained')
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        bars = {(r['model'], r['pass']): r for r in rows if (r['choice'], r['mode']) == kind}
        at = [g + (i - (len(kinds) - 1) / 2) * width for g, name in enumerate(groups)
              if name in bars]
        own = [bars[name] for name in groups if name in bars]
        middle = [float(row['p50_ms']) for row in own]
        spread = [[m - float(row['p20_ms']) for m, row in zip(middle, own, strict=True)],
                  [float(row['p80_ms']) - m for m, row in zip(middle, own, strict=True)]]
        axes.bar(at, middle, width, yerr=spread, label=' '.join(kind), capsize=2)
    axes.set_xticks(range(len(groups)), ['\n'.join(name) for name in groups], fontsize=8)
    first = rows[0]
    axes.set_ylabel('ms per step, median; whiskers 20 % to 80 %')
    axes.set_title(f"{first['device']}, {first['B']} x {first['H']} x {first['W']}, "
                   f"{first['dtype']}, {first['commit']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=MODELS_OF_INTEREST, metavar='CLASS:ARCH')
    parser.add_argument('--choices', help='comma-separated; default: what is usable here')
    parser.add_argument('--size', nargs=2, type=int, default=(512, 512), metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dtype', choices=TOLERANCE, default='float32')
    parser.add_argument('--passes', nargs='+', choices=PASSES, default=PASSES)
    parser.add_argument('--modes', nargs='+', choices=MODES,
                        help='default: eager, and graph on a GPU')
    parser.add_argument('--compiler', default='inductor', metavar='BACKEND',
                        help='of torch.compile, for the mode compiled (default: inductor)')
    parser.add_argument('--turns', type=int, default=5, help='turns per choice (default: 5)')
    parser.add_argument('--seconds', type=float, default=60, metavar='S',
                        help='no further turn after these of one pass (default: 60)')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='begin no further model after these')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument('--device', choices=('cpu', 'cuda'),
                        default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--clock', choices=CLOCKS, help='default: cuda on a GPU, else wall')
    parser.add_argument('--check-size', type=int, default=64, metavar='SIDE',
                        help='image of the correctness gate (default: 64)')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    parser.add_argument('--plot', metavar='PATH', nargs='?', const='',
                        help='write a picture; default: beside the CSV')
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; use --device cpu.')
    if args.modes is None:
        args.modes = ['eager', 'graph'] if args.device == 'cuda' else ['eager']
    if 'graph' in args.modes and args.device == 'cpu':
        parser.error('--modes graph needs a GPU.')
    if args.plot == '' and not args.csv:
        parser.error('--plot without a path needs --csv, to lie beside it.')
    args.clock = args.clock or default_clock(args.device)
    return args


def main(arguments: list[str] | None = None, build_arguments: dict[str, dict] | None = None) -> int:
    """Measure, print, record; return 1 when a choice is wrong.

    Args:
        arguments: of the command line.
        build_arguments: per model further arguments of its class.
    """
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    record = environment(args.device, args.clock)
    print('  '.join(f'{key} {value}' for key, value in record.items()))
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    everything, failures, limit = [], Failures(), TimeLimit(args.minutes)
    for model in args.models:
        if limit.passed(model):
            continue
        with failures.noted(model):
            own = (build_arguments or {}).get(model)
            choices = (args.choices.split(',') if args.choices
                       else default_choices(args.device, model))
            for row in measure(args, model, choices, record, failures, own):
                shown = ('model', 'pass', 'mode', 'choice', 'p20_ms', 'p50_ms', 'p80_ms',
                         'images_per_s', 'saved_MB', 'peak_MB', 'error')
                print('  '.join(f'{key} {row[key]}' for key in shown if row.get(key)), flush=True)
                if args.csv:
                    append_rows(args.csv, COLUMNS, [row])
                everything.append(row)
    if args.plot is not None and everything:
        plot(everything, Path(args.plot or Path(args.csv).with_suffix('.png')))
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
