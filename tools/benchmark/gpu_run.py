"""All that a GPU can say in a few minutes, for gpu_run.sh, which see.

Parts run one after the other in processes of their own, what is missed most first. Each has a share
of the time that is left, and is killed with all that it started when that is over; what it has
measured by then is in its file.

The machine may be taken away at any moment. So a few seconds after anything changed, OUT has it:
summary.md, failures.txt (what failed, with its reason, as soon as it has), and results.tar.gz with
all rows, logs and profiles. Each is replaced as a whole; there are no other files.
"""

import argparse
import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from kernel_cache import unpack

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
# What a killed process may need to let go of the GPU.
_GRACE = 10
# Between two looks at what is new.
_SECONDS = 3


# Cases of steps.py, those that no run has measured first.
STEPS = ('mambavision_t_det', 'vmamba_t_det', 'vim_ti_seg', 'localvmamba_t_seg', 'localvim_t_seg',
         'mambavision_t_cls', 'mambavision_t_seg', 'vmamba_t_seg', 'mambavision_t_tight_det')


class Part(NamedTuple):
    """One process of the run.

    Attributes:
        name: of its log.
        share: of the time that is left, against the shares of the parts that follow.
        command: what runs; '{minutes}' in it becomes nine tenths of the part's time.
        environment: further variables.
    """

    name: str
    share: float
    command: list[str]
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)


def parts_of(out: Path, dry: bool) -> list[Part]:
    """What there is to run, in order: what later parts need first, then by what is missed most."""

    def script(name, *arguments):
        return [sys.executable, str(FOLDER / name), *arguments]

    def rows(name, *arguments, limit=('--minutes', '{minutes}')):
        return script(f'{name}.py', *arguments, *limit, '--csv', str(out / f'{name}.csv'))

    cpu = ('--device', 'cpu', '--threads', '1')
    interpreted = {'TRITON_INTERPRET': '1'} if dry else {}
    if dry:
        commands = {
            'tests': [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', 'tests/test_gpu', '-k',
                      'mixer or mixed_precision'],
            'ops': rows('ops', *cpu, '--rounds', '1', '--shape', '1,9,4,1',
                        '--backends', 'reference,torch,triton'),
            'mixer': rows('mixer', *cpu, '--rounds', '1', '--small', '--only', 'uneven',
                          '--variants', 'plain reference,fused'),
            'backbone': rows('backbone', *cpu, '--models', 'Vim:tiny', '--choices', 'torch',
                             '--size', '32', '32', '--batch', '1', '--turns', '1',
                             '--check-size', '32'),
            'steps': rows('steps', '--device', 'cpu', '--small', '--case', 'vmamba_t_seg',
                          '--turns', '1'),
            'attention': rows('attention', *cpu, '--rounds', '1', '--small', '--only', 'uneven'),
            'train': script('iterations.py', 'configs/upernet_mambavision_mini_ade20k.py',
                            '--small', '--no-amp', '--ways', 'eager',
                            '--data', str(out / 'data'), '--csv', str(out / 'iterations.csv'),
                            '--cfg-options', 'train_cfg.max_iters=7',
                            'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0',
                            'train_dataloader.persistent_workers=False',
                            'val_dataloader.persistent_workers=False'),
            'host': script('host.py', '--stub', '--only', '^scan$'),
            'resolutions': rows('resolutions', *cpu, '--sizes', '32', '--models', 'DeiT',
                                '--batch', '1', '--turns', '1', '--counted-batch', '1'),
            'fpn': rows('resolutions', *cpu, '--fpn', '--sizes', '32', '--models', 'DeiT',
                        '--batch', '1', '--turns', '1', '--counted-batch', '1'),
            'pareto': rows('pareto', *cpu, '--only', 'MambaVision-T$', '--size', '32',
                           '--batch', '1', '--turns', '1', limit=()),
        }
    else:
        commands = {
            'tests': ['bash', 'tools/run_tests.sh', '--gpu'],
            'ops': rows('ops', '--rounds', '10', '--seconds', '1'),
            'mixer': rows('mixer', '--rounds', '10', '--seconds', '1'),
            'backbone': rows('backbone', '--dtype', 'bfloat16', '--seconds', '5'),
            'steps': rows('steps', '--turns', '9', '--seconds', '3', '--case', *STEPS),
            'attention': rows('attention', '--rounds', '5', '--seconds', '1'),
            'train': script('iterations.py', '--seconds', '30', '--ways', 'eager', 'graphs',
                            '--data', str(out / 'data'), '--csv', str(out / 'iterations.csv')),
            'host': script('host.py'),
            'resolutions': rows('resolutions', '--seconds', '20'),
            'fpn': rows('resolutions', '--fpn', '--seconds', '20'),
            'pareto': rows('pareto', '--seconds', '60', limit=()),
        }
    jobs = ('--dry-run',) if dry else ()
    commands |= {
        'imports': script('gpu_jobs.py', 'imports', *jobs),
        'compile': script('gpu_jobs.py', 'compile', *jobs),
        'plans': script('gpu_jobs.py', 'sweep', '--csv', str(out / 'scan_plans.csv'),
                        '--minutes', '{minutes}', *jobs),
        'forms': script('gpu_jobs.py', 'forms', '--csv', str(out / 'scan_forms.csv'),
                        '--minutes', '{minutes}', *jobs),
        'profile': script('gpu_jobs.py', 'profile', '--out', str(out), *jobs),
    }
    shares = dict(imports=20, compile=10, tests=20, ops=8, plans=6, forms=4, steps=14, host=6,
                  train=10, profile=5, attention=4, resolutions=6, fpn=6, pareto=6, mixer=8,
                  backbone=5)
    plain = 'imports', 'host', 'resolutions', 'fpn', 'pareto'  # the others are interpreted
    return [
        Part(name, share, commands[name], {} if name in plain else interpreted)
        for name, share in shares.items() if name in commands
    ]


class Stopped(Exception):
    """The run was asked to end."""


def run_part(part: Part, seconds: float, log: Path, environment: dict[str, str]) -> str:
    """Run a part for at most so long; 'passed', or what else became of it."""
    minutes = f'{0.9 * seconds / 60:.2f}'
    command = [x.replace('{minutes}', minutes) for x in part.command]
    with open(log, 'w') as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment | part.environment, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f'killed after {seconds:.0f} s'
        finally:
            end(process)
    return 'passed' if code == 0 else f'failed, exit code {code}'


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, kindly at first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def run(parts: list[Part], minutes: float, out: Path) -> dict[str, str]:
    """Run all parts; what became of each, those that had no time left included."""
    finish = time.monotonic() + 60 * minutes
    found: dict[str, str] = {}
    environment = os.environ | {
        'PYTHON': sys.executable, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
        'TRITON_CACHE_DIR': os.environ.get('TRITON_CACHE_DIR', str(out / 'triton')),
    }
    try:
        for i, part in enumerate(parts):
            left = finish - time.monotonic()
            if left < 1:
                found[part.name] = 'not begun, no time left'
                continue
            seconds = left * part.share / sum(other.share for other in parts[i:])
            print(f'[gpu_run] {part.name}: at most {seconds:.0f} s', flush=True)
            started = time.monotonic()
            found[part.name] = 'stopped'
            found[part.name] = run_part(part, seconds, out / f'{part.name}.log', environment)
            took = f'{found[part.name]}, {time.monotonic() - started:.0f} s'
            print(f'[gpu_run] {part.name}: {took}', flush=True)
            found[part.name] = took
            write_summary(out, parts, found)
    finally:
        write_summary(out, parts, found)
    return found


# --- the summary ----------------------------------------------------------------------------------


class Target(NamedTuple):
    """A ratio of the scan or the mixer against CUDA's scan in the same run that is to be reached.

    Attributes:
        file: without its .csv.
        shapes: regular expression for names of shapes.
        passes: 'forward' or 'forward+backward'.
        mode: 'graph' or 'eager'.
        least: of the ratio; with ``of_graph`` a factor of the same row's ratio in graph mode.
    """

    file: str
    shapes: str
    passes: str
    mode: str
    least: float
    of_graph: bool = False


_LONG = r'detection|classification \S+ s3|Vim'
_BUSY = r'segmentation|VMamba|classification \S+ s4'
TARGETS = (
    Target('ops', _LONG, 'forward', 'graph', 2.5),
    Target('ops', r'classification \S+ s4', 'forward', 'graph', 5),
    Target('ops', r'segmentation|VMamba', 'forward', 'graph', 1.2),
    Target('ops', _LONG, 'forward+backward', 'graph', 3),
    Target('ops', r'classification \S+ s4', 'forward+backward', 'graph', 4),
    Target('ops', r'segmentation|VMamba\S* \d+ stage [123]', 'forward+backward', 'graph', 1.5),
    Target('ops', r'VMamba\S* \d+ stage 4', 'forward+backward', 'graph', 2),
    Target('ops', _BUSY, 'forward', 'eager', 1.0),
    Target('ops', _BUSY, 'forward+backward', 'eager', 1.25),
    Target('ops', _LONG, 'forward', 'eager', 0.9, of_graph=True),
    Target('ops', _LONG, 'forward+backward', 'eager', 0.9, of_graph=True),
    *(Target('mixer', '.', what, mode, 1.3)
      for mode in ('graph', 'eager') for what in ('forward', 'forward+backward')),
)
_OURS = {'ops': ('backend', 'triton', 'cuda_over_this'),
         'mixer': ('variant', 'fused', 'anchor_over_this')}


def read_rows(path: Path) -> list[dict]:
    """Rows of a results file; none without one. A row that was cut off is left out."""
    if not path.exists():
        return []
    with open(path, newline='') as stream:
        return [row for row in csv.DictReader(stream) if None not in row.values()]


def against(target: Target, rows: list[dict]) -> list[tuple[str, str, float, float]]:
    """(shape, dtype, ratio, least ratio) of each row that a target is about."""
    column, ours, ratio = _OURS[target.file]
    mine = {
        (row['shape'], row['dtype'], row['mode']): float(row[ratio])
        for row in rows
        if row[column] == ours and row['pass'] == target.passes and row.get(ratio)
        and row.get('anchor', 'plain cuda') == 'plain cuda'
    }
    found = []
    for (shape, dtype, mode), value in mine.items():
        if mode != target.mode or not re.search(target.shapes, shape):
            continue
        least = target.least
        if target.of_graph:
            graph = mine.get((shape, dtype, 'graph'))
            if graph is None:
                continue
            least *= graph
        found.append((shape, dtype, value, least))
    return found


def target_lines(out: Path) -> list[str]:
    """The table of targets."""
    lines = ['| what | target | measured |', '|---|---|---|']
    for target in TARGETS:
        rows = against(target, read_rows(out / f'{target.file}.csv'))
        wanted = f'>= {target.least:g}' + (' of its graph ratio' if target.of_graph else 'x')
        shapes = 'all shapes' if target.shapes == '.' else target.shapes
        shapes = re.sub(r' ?\\S[+*]( \\d\+)?', '', shapes.replace('|', ', '))
        said = '; '.join(
            f'{shape} ({dtype}) {value:.2f}x' + ('' if value >= least else ' **short**')
            for shape, dtype, value, least in rows
        )
        name = {'ops': 'scan', 'mixer': 'mixer'}[target.file]
        lines.append(f'| {name}, {target.passes}, {target.mode}: {shapes} | {wanted} | '
                     f'{said or "not measured"} |')
    return lines


# Result files that the summary shows as they are: rows that were timed, of these columns.
TABLES = (
    ('backbone', 'Backbones',
     ('model', 'pass', 'mode', 'choice', 'p50_ms', 'images_per_s', 'peak_MB')),
    ('steps', 'Steps of whole backbones, against the official ones eager in an earlier run',
     ('case', 'pass', 'way', 'p50_ms', 'peak_MB', 'error', 'official_over_this')),
    ('iterations', 'Iterations of tools/train.py',
     ('config', 'way', 'p50_ms', 'data_ms', 'peak_MB', 'eager_over_this', 'graphs')),
    ('launches', 'Kernel launches of a training step',
     ('step', 'dtype', 'launches', 'most', 'kernels_us')),
    ('attention', 'Attention',
     ('shape', 'variant', 'pass', 'mode', 'p50_ms', 'default_over_this', 'kernel')),
    ('resolutions', 'Vim against DeiT', ('model', 'size', 'B', 'p50_ms', 'images_per_s')),
    ('pareto', 'Published accuracy against speed',
     ('model', 'size', 'B', 'dtype', 'published_top1', 'images_per_s')),
)


# --- what survives --------------------------------------------------------------------------------


class Mirror:
    """Keeps what has been written in a folder of few files, whole ones at any moment.

    Args:
        work: where parts write.
        out: the folder.
    """

    def __init__(self, work: Path, out: Path):
        self._work, self._out = work, out
        self._seen: dict[Path, tuple] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self):
        self._out.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()
        self.copy()

    def _go_on(self) -> None:
        while not self._stopped.wait(_SECONDS):
            try:
                self.copy()
            except OSError as error:  # a full disk must not end what measures
                print(f'[gpu_run] {self._out} is not up to date: {error}', flush=True)

    def copy(self) -> None:
        """Bring the folder up to date, unless nothing has changed."""
        found = {path: (path.stat().st_size, path.stat().st_mtime_ns)
                 for path in sorted(self._work.glob('*')) if path.suffix in _RESULTS}
        if found == self._seen:
            return
        self._seen = found
        summary = self._work / 'summary.md'
        if summary in found:
            self._replace('summary.md', lambda part: part.write_bytes(summary.read_bytes()))
        failed = failures_of([path for path in found if path.suffix == '.log'])
        self._replace('failures.txt', lambda part: part.write_text(failed))
        self._replace('results.tar.gz', lambda part: _archive(part, list(found)))

    def _replace(self, name: str, write) -> None:
        part = self._out / f'{name}.part'
        write(part)
        part.replace(self._out / name)


_RESULTS = ('.csv', '.log', '.md', '.txt', '.png')
_FAILED = re.compile(r'(FAILED |ERROR |\[tests\] ERROR:|E   |[\w.]+(Error|Exit|Exception): )')


def _archive(part: Path, files: list[Path]) -> None:
    with tarfile.open(part, 'w:gz', compresslevel=3) as tar:
        for path in files:
            tar.add(path, path.name)


def failures_of(logs: list[Path]) -> str:
    """Lines of logs that say that something failed, and why."""
    found = []
    for log in logs:
        lines = [line for line in log.read_text(errors='replace').splitlines()
                 if _FAILED.match(line)]
        found += [f'== {log.stem}', *lines, ''] if lines else []
    return '\n'.join(found) or 'Nothing has failed so far.\n'


def tail(log: Path, count: int) -> list[str]:
    """The last lines of a log."""
    lines = log.read_text(errors='replace').splitlines() if log.exists() else []
    return lines[-count:]


def write_summary(out: Path, parts: list[Part], found: dict[str, str]) -> None:
    """summary.md; put in place at once, so that there is always a whole one."""
    lines = ['# What the GPU said', '']
    some = read_rows(out / 'ops.csv') or read_rows(out / 'mixer.csv')
    if some:
        lines += [', '.join(f'{key} {some[0][key]}' for key in
                            ('device', 'torch', 'triton', 'commit') if some[0].get(key)), '']
    lines += ['| part | what became of it |', '|---|---|']
    lines += [f'| {part.name} | {found.get(part.name, "not begun")} |' for part in parts]
    lines += ['', "## Against the targets (CUDA's scan over ours, same run)", '',
              *target_lines(out)]
    for file, title, columns in TABLES:
        rows = [row for row in read_rows(out / f'{file}.csv') if row.get('p50_ms', 'none')]
        if rows:
            lines += ['', f'## {title}', '', f'| {" | ".join(columns)} |',
                      '|---' * len(columns) + '|']
            lines += [f'| {" | ".join(row[key] for key in columns)} |' for row in rows]
    for name, title, count in (('tests', 'Tests', 12), ('host', 'Host', 12), ('plans', 'Plans', 9),
                               ('forms', 'Forms of plans', 60)):
        if tail(out / f'{name}.log', count):
            lines += ['', f'## {title}, end of the log', '', '```',
                      *tail(out / f'{name}.log', count), '```']
    part = out / 'summary.md.part'
    part.write_text('\n'.join(lines) + '\n')
    part.replace(out / 'summary.md')


def parse(arguments=None) -> argparse.Namespace:
    """The command line, with the folder of the results."""
    parser = argparse.ArgumentParser(
        prog='gpu_run.sh', description='All that a GPU can say in a few minutes.'
    )
    parser.add_argument('minutes', type=float, metavar='MINUTES', help='for everything together')
    parser.add_argument('--dry-run', action='store_true',
                        help='everything on a CPU, interpreted, at the smallest shapes')
    args = parser.parse_args(arguments)
    if not 0 < args.minutes < float('inf'):
        parser.error(f'MINUTES is {args.minutes:g}; expected more than 0, such as 10')
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error('PyTorch sees no GPU; --dry-run tries everything on a CPU')
    default = ROOT / 'work_dirs' / 'gpu_run' / time.strftime('%Y%m%d-%H%M%S')
    args.work = Path(os.environ.get('WORK') or default).resolve()
    args.out = Path(os.environ.get('OUT') or args.work / 'out').resolve()
    kernels = os.environ.get('KERNELS')
    args.kernels = Path(kernels).resolve() if kernels else None
    if args.kernels and not args.kernels.is_file():
        parser.error(f'KERNELS={kernels} is not a file; make it with kernel_cache.py fill, or '
                     'leave it out')
    if args.work == args.out:
        parser.error(f'WORK and OUT are both {args.work}; expected two folders, the second for few '
                     'files')
    return args


def stop(number, frame):
    """A signal ends the part that runs and leads to the summary."""
    raise Stopped(signal.Signals(number).name)


def main(arguments=None) -> int:
    """Run everything; 0 when every part passed."""
    args = parse(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    parts = parts_of(args.work, args.dry_run)
    if args.kernels:
        cache = Path(os.environ.get('TRITON_CACHE_DIR') or args.work / 'triton')
        print(f'[gpu_run] {unpack(args.kernels, cache)} kernels and launchers from {args.kernels}',
              flush=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        with Mirror(args.work, args.out):
            found = run(parts, args.minutes, args.work)
    except Stopped as error:
        print(f'[gpu_run] stopped by {error}; see {args.out / "summary.md"}', flush=True)
        return 1
    bad = [name for name, what in found.items() if not what.startswith('passed')]
    print((args.out / 'summary.md').read_text())
    print(f'[gpu_run] {args.out}: ' + (f'not passed: {", ".join(bad)}' if bad else 'all passed'))
    return int(bool(bad))


if __name__ == '__main__':
    sys.exit(main())
