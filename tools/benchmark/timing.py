"""What the benchmark scripts beside this file share: turns, clocks, percentiles and the record.

A script of this folder finds it with ``from timing import ...`` when it is run by its path.
"""

import argparse
import contextlib
import csv
import gc
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

# In a clone that is not installed the package is beside tools/.
sys.path.append(str(Path(__file__).resolve().parents[2]))

#: Where and on what a row was measured; the first columns of every results file.
ENVIRONMENT = ('device', 'torch', 'triton', 'commit', 'clock', 'threads')
#: The last columns of every results file, in milliseconds per call.
PERCENTILES = ('turns', 'p20_ms', 'p50_ms', 'p80_ms')
#: 'wall' and 'cpu' (the process's own time, for one thread on a shared machine) ask the host,
#: 'cuda' puts events around the work on the GPU.
CLOCKS = ('wall', 'cpu', 'cuda')
# Copies of the inputs that calls rotate over exceed this, so that no cache holds them.
_CACHE_BYTES = 128 << 20


def processor(device: str = 'cpu') -> str:
    """Name of the GPU or CPU, for the record."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(x.split(':', 1)[1].strip() for x in lines if x.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Short name of the commit that is measured, with -dirty when files differ from it."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty']
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or 'unknown'


def environment(device: str, clock: str) -> dict[str, str]:
    """The columns of `ENVIRONMENT`; Triton's version is empty when nothing has imported it."""
    triton = getattr(sys.modules.get('triton'), '__version__', '')
    values = (processor(device), torch.__version__, triton, commit(), clock,
              str(torch.get_num_threads()))
    return dict(zip(ENVIRONMENT, values, strict=True))


def default_clock(device: str) -> str:
    """'cuda' for a GPU, 'wall' for anything else."""
    return 'cuda' if torch.device(device).type == 'cuda' else 'wall'


def add_options(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    """Add the options of a script that times variants of one operation at many shapes."""
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', choices=['cuda', 'cpu'], default=here)
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'],
                        help='default: bfloat16 on a GPU, float32 on a CPU')
    parser.add_argument('--small', action='store_true', help='two small shapes, to try the script')
    parser.add_argument('--only', metavar='REGEX', default='', help='shapes whose name matches')
    parser.add_argument('--rounds', type=int, default=rounds,
                        help=f'turns per variant (default: {rounds})')
    parser.add_argument('--seconds', type=float, default=seconds, metavar='S',
                        help=f'no further turn after these of one measurement (default: {seconds})')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='begin no further shape after these')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: 2)')
    parser.add_argument('--clock', choices=CLOCKS, help='default: cuda on a GPU, wall on a CPU')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')


def complete_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what was left to the device, and end the script where options contradict it."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; use --device cpu')
    args.dtype = args.dtype or {'cuda': 'bfloat16', 'cpu': 'float32'}[args.device]
    args.clock = args.clock or default_clock(args.device)
    if (args.clock == 'cuda') != (args.device == 'cuda'):
        parser.error(f'--clock {args.clock} does not measure --device {args.device}')
    args.modes = ('eager', 'graph') if args.device == 'cuda' else ('eager',)


class Failures(list):
    """What failed so far: one failure must not cost the rest of a rare run on a GPU."""

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Print an error of the block, keep ``what``, and go on behind the block.

        Raises:
            SystemExit: the GPU itself has failed, after which nothing could be measured.
        """
        try:
            yield
            return
        except Exception as error:
            self.append(what)
            traceback.print_exc()
            print(f'FAILED {what}: {in_one_line(error)}', flush=True)
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise SystemExit(
                    f'the GPU answers nothing after that ({error}); leave {what} out and start '
                    'again. Rows measured so far are in the file of --csv.'
                ) from error


def in_one_line(error: BaseException) -> str:
    """An error, and the first of those that led to it.

    A capture that failed ends in "operation failed due to a previous error during capture", which
    says nothing; what broke it is the error before.
    """

    def line(error):
        text = (str(error).strip().splitlines() or [''])[0]
        return f'{type(error).__name__}: {text}'

    first = error
    while before := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = before
    return line(error) if first is error else f'{line(error)} (first came {line(first)})'


class TimeLimit:
    """Says when it is too late to begin something new; None for never."""

    def __init__(self, minutes: float | None):
        self.minutes = minutes
        self.end = time.monotonic() + 60 * (math.inf if minutes is None else minutes)

    def passed(self, what: str) -> bool:
        """Whether the time is up, in which case ``what`` is said to be left out."""
        if time.monotonic() < self.end:
            return False
        print(f'not measured, {self.minutes:g} minutes have passed: {what}', flush=True)
        return True


class Work(NamedTuple):
    """Something to time: ``run`` does it, and counts as ``calls`` calls."""

    run: Callable[[], object]
    calls: int


def in_sequence(calls: Sequence[Callable[[], object]]) -> Work:
    """One call after the other, launched by the host."""

    def run():
        for call in calls:
            call()

    return Work(run, len(calls))


#: Calls before a capture: the first compiles, the second lets the scan note what reaches Triton's
#: launchers, and the third launches as the captured one will.
WARM_UPS = 3


def as_graph(calls: Sequence[Callable[[], object]]) -> Work:
    """The same calls captured in one CUDA graph, which the GPU replays without the host.

    They are warmed up on the stream of the capture, so that libraries have their workspaces for it.
    A backward pass cannot be captured while an earlier autograd graph of the same parameters lives:
    its nodes wait for the stream on which they were made.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream behind as the current one; leaving this block does not.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for call in calls:
                call()
        gc.collect()  # cyclic garbage may hold autograd graphs, and other CUDA graphs
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    return Work(graph.replay, len(calls))


def input_sets(bytes_each: int, device: str) -> int:
    """How many copies of the inputs calls should rotate over; 1 on a CPU."""
    if torch.device(device).type != 'cuda':
        return 1
    return min(16, max(2, -(-_CACHE_BYTES // max(1, bytes_each))))


def seconds_per_call(work: Work, clock: str) -> float:
    """Time one run of the work."""
    if clock == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / work.calls
    now = {'wall': time.perf_counter, 'cpu': time.process_time}[clock]
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else int
    synchronize()
    begin = now()
    work.run()
    synchronize()
    return (now() - begin) / work.calls


def take_turns(works: dict[str, Work], turns: int, clock: str,
               seconds: float = math.inf) -> dict[str, list[float]]:
    """Time all works A B A B ..., so that a change of the machine's load hits each of them.

    Nothing is warmed up here: a correctness check before has compiled what needs compiling.

    Args:
        works: by name.
        turns: of every work; fewer when they take long.
        clock: one of `CLOCKS`.
        seconds: after which no further turn begins.

    Returns:
        Seconds per call, up to ``turns`` values for every name, equally many.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.monotonic() + seconds
    for turn in range(turns):
        if turn and time.monotonic() > end:
            break
        for name, work in works.items():
            times[name].append(seconds_per_call(work, clock))
    return times


def percentiles(seconds: Sequence[float]) -> dict[str, str]:
    """The columns of `PERCENTILES` for the times of one work."""
    cuts = [seconds[0]] * 9
    if len(seconds) > 1:
        cuts = statistics.quantiles(seconds, n=10, method='inclusive')
    values = (str(len(seconds)), *(f'{cuts[i] * 1e3:.4g}' for i in (1, 4, 7)))
    return dict(zip(PERCENTILES, values, strict=True))


def append_rows(path: str, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Append rows to a CSV file that has exactly these columns; a new file gets them first.

    Raises:
        ValueError: the file has other columns.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    if not is_new:
        with open(file, newline='') as stream:
            found = next(csv.reader(stream), [])
        if found != list(columns):
            differing = sorted(set(found) ^ set(columns)) or 'their order'
            raise ValueError(f'{path} has other columns than this script writes ({differing}); '
                             'give --csv another file')
    with open(file, 'a', newline='') as stream:
        writer = csv.DictWriter(stream, columns, restval='', lineterminator='\n')
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def saved_bytes(call: Callable[[], object], ignored: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that one call keeps for its backward pass, each storage counted once.

    Args:
        call: runs the forward pass.
        ignored: parameters; they live on anyway, and their copies in another dtype (tensors of a
            parameter's shape, or that transposed) are apart from what grows with the tokens.
    """
    ignored = list(ignored)
    shapes = {x.shape for x in ignored} | {x.shape[::-1] for x in ignored}
    seen = {x.untyped_storage()._cdata for x in ignored}
    total = 0

    def pack(x):
        nonlocal total
        storage = x.untyped_storage()
        # _cdata is the storage's identity, which fake tensors have too.
        if storage._cdata not in seen and x.shape not in shapes:
            seen.add(storage._cdata)
            total += storage.nbytes()
        # Not x: an operator that keeps its own output would keep itself alive through it, and with
        # it the whole autograd graph, for good. No backward pass of its parameters could then be
        # captured in a CUDA graph.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # kept until all is counted, so that no identity is used twice
    del result
    return total


def plot_rows(path: str, rows: Sequence[dict], series: str, title: str) -> None:
    """Draw medians (with p20 to p80) and floors: a panel per pass and mode, a group per shape.

    Args:
        path: image file to write.
        rows: as they go to the CSV, with the columns shape, pass, mode and `PERCENTILES`, and
            perhaps floor_ms; rows without a time are left out.
        series: the column whose values are compared side by side.
        title: what was measured.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f'--plot needs matplotlib ({error}); pip install matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot

    timed = [row for row in rows if row.get('p50_ms')]
    panels = list(dict.fromkeys((row['pass'], row['mode']) for row in timed))
    names = list(dict.fromkeys(row[series] for row in timed))
    shapes = list(dict.fromkeys(row['shape'] for row in timed))
    height = 1.5 + 0.18 * len(shapes) * (len(names) + 1)
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(3.5 + 4 * max(1, len(panels)), height), sharey=True,
        squeeze=False, layout='constrained',
    )
    for axis, panel in zip(axes[0], panels, strict=False):
        for row in timed:
            if (row['pass'], row['mode']) != panel:
                continue
            i, group = names.index(row[series]), shapes.index(row['shape'])
            low, middle, high = (float(row[f'p{p}_ms']) for p in (20, 50, 80))
            at = group + (i + 0.5) / (len(names) + 1)
            axis.barh(at, middle, 0.9 / (len(names) + 1), color=f'C{i}',
                      xerr=[[middle - low], [high - middle]], ecolor='0.3')
            if row.get('floor_ms'):
                floor = float(row['floor_ms'])
                axis.plot([floor, floor], [group, group + 0.9], color='k', linewidth=1)
        axis.set(title=' '.join(panel), xlabel='ms per call', xscale='log')
        axis.grid(axis='x', alpha=0.3)
    axes[0][0].set_yticks([group + 0.45 for group in range(len(shapes))], shapes)
    axes[0][0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f'C{i}') for i in range(len(names))]
    figure.legend(handles, names, loc='outside lower center', ncols=len(names))
    figure.suptitle(f'{title}\n{rows[0]["device"]}, torch {rows[0]["torch"]}; black: floor')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the error over RMS of the expected values."""
    error = (got.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt()).item()
