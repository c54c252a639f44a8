"""Time backbones on a CPU against an older version of this package, in turns (A B A B).

    python tools/benchmark/cpu.py --against d7a90d8 --threads 2
    python tools/benchmark/cpu.py --against ../older --models VMamba:tiny --csv results/cpu.csv

A model is CLASS:ARCH, or CLASS:ARCH:ARGUMENT=VALUE with further arguments behind it.

The older version is a commit of this repository or a folder that holds `mmhybrid`. Both versions
run in processes of their own with the same weights and image, one call at a time, so that what
disturbs the machine disturbs both; the ratio is the median over the turns of the older time divided
by the newer one. Maps that differ by more than rounding are reported, not timed, and make the exit
code 1. On a machine that others use take --clock cpu, which counts the processor time of all
threads, and one thread.
"""

import argparse
import ast
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import (
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    append_rows,
    environment,
    percentiles,
    relative_rms,
)

COLUMNS = (
    *ENVIRONMENT, 'against', 'model', 'B', 'H', 'W', 'dtype', 'pass', *PERCENTILES,
    'against_p50_ms', 'ratio', 'p20_ratio', 'p80_ratio', 'error',
)
MODELS = ('VMamba:tiny', 'Vim:tiny', 'LocalVMamba:tiny', 'MambaVision:tiny')
PASSES = ('forward', 'forward+backward')
TOLERANCE = 1e-4  # RMS of the difference of two maps over that of one, float32
_CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
_ROOT = Path(__file__).resolve().parents[2]


def folder_of(against: str, scratch: Path) -> Path:
    """Folder that holds the older `mmhybrid`: the one named, or a commit taken out of git."""
    if (Path(against) / 'mmhybrid').is_dir():
        return Path(against).resolve()
    command = ['git', '-C', str(_ROOT), 'archive', '--format=zip', against, 'mmhybrid']
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors='replace').strip().splitlines()[-1:]
        raise SystemExit(f'--against {against} is neither a folder with mmhybrid in it nor a '
                         f'commit of {_ROOT} ({" ".join(reason)}).')
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as file:
        file.extractall(scratch)
    return scratch


class Version:
    """One version of the package at work in a process of its own."""

    def __init__(self, folder: Path, model: str, what: str, args, maps: Path):
        self.maps = maps
        settings = [str(x) for x in (folder, model, what, args.clock, args.threads, args.batch,
                                     *args.size, maps)]
        # Threads that wait must not count as work.
        variables = {'OMP_NUM_THREADS': str(args.threads), 'OMP_WAIT_POLICY': 'passive'}
        self.process = subprocess.Popen(
            [sys.executable, __file__, '--worker', *settings], env=os.environ | variables,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(self) -> float:
        """Seconds of the call that was asked for; of the first answer, of the warm-up."""
        for line in self.process.stdout:
            if line.startswith('seconds '):
                return float(line.split()[1])
        raise RuntimeError(f'the process of {self.maps.stem} ended with {self.process.wait()}')

    def call(self) -> float:
        """Let it run once."""
        print('go', file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def work(folder, model, what, clock, threads, batch, height, width, maps) -> None:
    """What a process does: build, save the maps, then time one call per line that comes in."""
    sys.path.insert(0, folder)
    import mmhybrid.models
    from mmhybrid.registry import MODELS as registry

    assert Path(mmhybrid.__file__).is_relative_to(folder), mmhybrid.__file__
    torch.set_num_threads(int(threads))
    name, *more = model.split(':')
    arch = more.pop(0) if more else 'tiny'
    more = {key: ast.literal_eval(value) for key, value in (x.split('=') for x in more)}
    torch.manual_seed(0)
    network = registry.module_dict[name](arch=arch, drop_path_rate=0.0, **more).eval()
    x = torch.randn(int(batch), 3, int(height), int(width),
                    generator=torch.Generator().manual_seed(0))
    parameters = [p for p in network.parameters() if p.requires_grad]

    def call():
        with torch.set_grad_enabled(what != 'forward'):
            found = network(x)
            if what != 'forward':
                seeds = [torch.ones_like(y) for y in found]
                torch.autograd.grad(found, parameters, seeds, allow_unused=True)
        return found

    now = _CLOCKS[clock]
    for turn in range(1 << 30):
        started = now()
        found = call()
        seconds = now() - started
        if turn == 0:
            torch.save([y.detach() for y in found], maps)
        print(f'seconds {seconds}', flush=True)
        if not sys.stdin.readline():
            return


def measure(model: str, what: str, older: Path, args, scratch: Path) -> dict[str, str]:
    """The measured columns of a row.

    Raises:
        ValueError: the versions disagree.
    """
    new = Version(_ROOT, model, what, args, scratch / 'new.pt')
    old = Version(older, model, what, args, scratch / 'old.pt')
    try:
        for version in (old, new):
            version.answer()
        pairs = zip(*(torch.load(v.maps, weights_only=True) for v in (new, old)), strict=True)
        error = max(relative_rms(a, b) for a, b in pairs)
        if not error <= TOLERANCE:
            raise ValueError(f'maps of {model} differ by {error:.1e} from those of {args.against}')
        turns = [(old.call(), new.call()) for _ in range(args.turns)]
    finally:
        new.close()
        old.close()
    before, now = zip(*turns, strict=True)
    ratios = percentiles([a / b * 1e-3 for a, b in turns])
    return percentiles(now) | {
        'against_p50_ms': f'{statistics.median(before) * 1e3:.4g}', 'ratio': ratios['p50_ms'],
        'p20_ratio': ratios['p20_ms'], 'p80_ratio': ratios['p80_ms'], 'error': f'{error:.1e}',
    }


def rows(args, failures: Failures) -> Iterator[dict[str, str]]:
    """A row per model and pass, each as soon as it is known."""
    record = environment('cpu', args.clock) | {'threads': str(args.threads)}
    height, width = args.size
    with tempfile.TemporaryDirectory() as scratch:
        older = folder_of(args.against, Path(scratch))
        for model in args.models:
            for what in args.passes:
                fixed = dict(against=args.against, model=model, B=args.batch, H=height, W=width,
                             dtype='float32', **{'pass': what})
                with failures.noted(f'{model}: {what}'):
                    yield record | fixed | measure(model, what, older, args, Path(scratch))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record; return 1 when something failed or disagreed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--against', required=True, metavar='DIR_OR_COMMIT')
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='CLASS:ARCH')
    parser.add_argument('--passes', nargs='+', choices=PASSES, default=PASSES[:1])
    parser.add_argument('--size', nargs=2, type=int, default=(512, 512), metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--turns', type=int, default=5, help='calls of each version (default: 5)')
    parser.add_argument('--clock', choices=_CLOCKS, default='wall')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    args = parser.parse_args(arguments)
    failures = Failures()
    for row in rows(args, failures):
        shown = ('model', 'pass', 'threads', 'against_p50_ms', 'p50_ms', 'ratio', 'p20_ratio',
                 'p80_ratio', 'error')
        print('  '.join(f'{key} {row[key]}' for key in shown), flush=True)
        if args.csv:
            append_rows(args.csv, COLUMNS, [row])
    return int(bool(failures))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        work(*sys.argv[2:])
    else:
        sys.exit(main())
