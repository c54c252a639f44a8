"""What the benchmark scripts beside this file share: turns, clocks, percentiles and the record.

A script of this folder finds it with ``from timing import ...`` when it is run by its path.
"""

import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

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


def as_graph(calls: Sequence[Callable[[], object]]) -> Work:
    """The same calls captured in one CUDA graph, which the GPU replays without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the caches of libraries
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
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


def take_turns(works: dict[str, Work], turns: int, clock: str) -> dict[str, list[float]]:
    """Time all works A B A B ..., so that a change of the machine's load hits each of them.

    Nothing is warmed up here: a correctness check before has compiled what needs compiling.

    Returns:
        Seconds per call, ``turns`` values for every name.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
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
        ignored: tensors that live on anyway, such as parameters.
    """
    seen = {x.untyped_storage()._cdata for x in ignored}
    total = 0

    def pack(x):
        nonlocal total
        storage = x.untyped_storage()
        if storage._cdata not in seen:  # its identity, which fake tensors have too
            seen.add(storage._cdata)
            total += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # kept until all is counted, so that no identity is used twice
    del result
    return total


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the error over RMS of the expected values."""
    error = (got.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt()).item()
