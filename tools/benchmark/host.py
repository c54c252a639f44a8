"""Count what a call of the scan costs the host: Python calls, allocations, launches and time.

    python tools/benchmark/host.py
    python tools/benchmark/host.py --stub

On a GPU a call's time on the host is given in launches of one addition of PyTorch's, next to which
the machine's speed falls away. With --stub no GPU is needed: all Python of ours and of Triton's
runs, kernels are compiled for sm_90, and what needs a driver (loading, streams, the launch itself)
is replaced by functions that take notes; the tensors lie on the CPU. The same call as an operator
with ordinary launches, which is how every call went up to commit 03c1dbf and how calls under a
compiler still go, is measured in the same turns. The last line holds the targets; the exit code is
1 when one is missed.
"""

import argparse
import collections
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from mmhybrid.layers import SS2D, LocalVimMixer, MambaVisionMixer, VimMixer
from mmhybrid.ops import (
    mambavision_mixer,
    selective_scan,
    selective_scan_ordered,
    triton_support,
)
from mmhybrid.ops.selective_scan import launch, triton_backend

#: Targets of one call of the scan: calls forward, calls of both passes, allocations backward.
TARGETS = {'forward calls': 60, 'forward+backward calls': 170, 'backward allocations': 2}


class Stub:
    """A driver and launchers that take notes instead of using a GPU."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher

        stub = self
        self.launches = 0

        class Launcher(CudaLauncher):
            """The launcher around the C function, without the C function."""

            def __init__(self, src, metadata):
                names = (
                    'global_scratch_size', 'global_scratch_align', 'profile_scratch_size',
                    'profile_scratch_align', 'launch_cooperative_grid', 'launch_pdl',
                )  # fmt: skip
                for name in names:
                    setattr(self, name, getattr(metadata, name))
                self.num_ctas = metadata.num_ctas
                self.launch = stub.launch

        self.launcher_cls = Launcher
        self.utils = self
        self.target = GPUTarget('cuda', 90, 32)
        self.binaries = 0

    def launch(self, *arguments):
        """In place of the C function."""
        self.launches += 1

    def load_binary(self, name, kernel, shared, device):
        """Module, function, registers, spills and largest number of threads."""
        self.binaries += 1
        return self, self.binaries, 64, 0, 1024

    def get_device_properties(self, device):
        """Those of an H200 that Triton asks for."""
        return {'max_shared_mem': 232448, 'multiprocessor_count': 132}

    def get_current_target(self):
        """What kernels are compiled for."""
        return self.target

    def get_current_device(self):
        """As Triton asks."""
        return 0

    def get_current_stream(self, device):
        """As Triton asks."""
        return 7

    @contextlib.contextmanager
    def installed(self):
        """Triton with this driver, and a scan that takes tensors on the CPU."""
        from triton.runtime import driver

        before = driver._active
        driver.set_active(self)
        with (
            mock.patch.object(triton_support, '_unavailable_reason', lambda: None),
            mock.patch.object(triton_support, 'unsupported_reason', lambda *_: None),
            mock.patch.object(mambavision_mixer, 'refusal', lambda device, dtype, state: None),
            mock.patch.object(launch, 'DIRECT', {'cpu'}),
            mock.patch.object(torch._C, '_cuda_getDevice', self.get_device, create=True),
            mock.patch.object(torch._C, '_cuda_getCurrentRawStream', self.get_stream, create=True),
        ):
            try:
                yield
            finally:
                driver._active = before

    @staticmethod
    def get_device():
        """As PyTorch gives it."""
        return 0

    @staticmethod
    def get_stream(device):
        """As PyTorch gives it."""
        return 7


class Work(NamedTuple):
    """A call to be measured, and the tensors that get gradients."""

    run: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]


def tokens(device, batch, length, channels):
    """Random (B, C, L) in bfloat16 whose channels are neighbours, a leaf of autograd."""
    x = torch.randn(batch, length, channels, device=device, dtype=torch.bfloat16).mT
    return x.requires_grad_()


def parameters(device, *shapes):
    """Random float32 leaves."""
    return [torch.rand(shape, device=device).requires_grad_() for shape in shapes]


def scan(device) -> Work:
    """The scan of a segmentation network's stage 4."""
    batch, length, channels, state = 2, 1024, 320, 8
    u, delta, B, C = (
        tokens(device, batch, length, n) for n in (channels, channels, state, state)
    )
    A, D, bias = parameters(device, (channels, state), (channels,), (channels,))
    leaves = [u, delta, A, B, C, D, bias]

    def run():
        return selective_scan(
            u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend='triton'
        )

    return Work(run, leaves)


def ordered_scan(device) -> Work:
    """The scan of four directions of a small map through a table."""
    batch, groups, group_dim, length = 2, 4, 96, 256
    u, delta = (
        tokens(device, batch, length, groups * group_dim).detach().unflatten(1, (groups, group_dim))
        .requires_grad_() for _ in range(2)
    )  # fmt: skip
    B, C = (
        torch.randn(batch, groups, 1, length, device=device, dtype=torch.bfloat16)
        .requires_grad_() for _ in range(2)
    )  # fmt: skip
    channels = groups * group_dim
    A, D, bias = parameters(device, (channels, 1), (channels,), (channels,))
    order = torch.stack([torch.randperm(length) for _ in range(groups)]).int().to(device)

    def run():
        return selective_scan_ordered(
            u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, order=order,
            backend='triton',
        )  # fmt: skip

    return Work(run, [u, delta, A, B, C, D, bias])


def mixer(make: Callable[[], torch.nn.Module], shape: tuple[int, ...], *rest):
    """A mixer of a network, by its class."""

    def work(device) -> Work:
        module = make().to(device)
        x = torch.randn(shape, device=device).requires_grad_()
        return Work(lambda: module(x, *rest), [x, *module.parameters()])

    return work


WORKS = {
    'scan': scan,
    'ordered scan': ordered_scan,
    'MambaVisionMixer': mixer(
        lambda: MambaVisionMixer(640, fused=True, backend='triton'), (2, 64, 640)
    ),
    'SS2D': mixer(lambda: SS2D(96, state_dim=1, backend='triton'), (2, 16, 16, 96)),
    'VimMixer': mixer(lambda: VimMixer(192, backend='triton'), (1, 65, 192)),
    'LocalVimMixer': mixer(
        lambda: LocalVimMixer(192, ('h', 'v', 'w2'), backend='triton'), (1, 64, 192), (8, 8)
    ),
}


class Count(NamedTuple):
    """What one call costs; ``where`` counts calls by file or, for built-in ones, by name."""

    calls: int
    allocations: int
    launches: int
    where: collections.Counter


def passes_of(work: Work) -> dict[str, Callable[[], None]]:
    """The forward pass without and with gradients, and both passes."""

    def alone():
        with torch.no_grad():
            work.run()

    y = work.run()
    dy = torch.ones_like(y)

    def both():
        torch.autograd.grad(work.run(), work.leaves, dy, allow_unused=True)

    def backward():
        torch.autograd.grad(y, work.leaves, dy, allow_unused=True, retain_graph=True)

    return {'no grad': alone, 'forward': work.run, 'backward': backward,
            'forward+backward': both}  # fmt: skip


def count_calls(run: Callable[[], None]) -> collections.Counter:
    """Calls of Python functions by file, and of built-in ones by name."""
    found = collections.Counter()

    def note(frame, event, argument):
        if event == 'call':
            found[Path(frame.f_code.co_filename).name] += 1
        elif event == 'c_call':
            found[argument.__name__] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    found['setprofile'] -= 1
    return +found


def count_allocations(run: Callable[[], None]) -> int:
    """Blocks of memory that PyTorch's allocators hand out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == '[memory]' and event.nbytes() > 0 for event in events)


def seconds(runs: dict[str, Callable[[], None]], turns=30, calls=20) -> dict[str, float]:
    """Median time per call, in turns."""
    times = collections.defaultdict(list)
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def as_operator(run: Callable[[], None]) -> Callable[[], None]:
    """The same through the dispatcher, with ordinary launches."""

    eager, direct = triton_backend.eager, launch.Program._direct

    def through():
        triton_backend.eager = launch.Program._direct = never
        try:
            run()
        finally:
            triton_backend.eager, launch.Program._direct = eager, direct

    return through


def never(*_) -> bool:
    """No, whatever is asked."""
    return False


def measure(name: str, make, device, stub: Stub | None) -> dict[str, Count]:
    """Every pass of one kind of call, directly."""
    found = {}
    runs = passes_of(make(device))
    for _ in range(3):  # compiles, notes what reaches the launchers, and goes past Triton
        for run in runs.values():
            run()
    for kind, run in runs.items():
        where = count_calls(run)
        before = stub.launches if stub else 0
        run()
        launches = stub.launches - before if stub else 0
        found[kind] = Count(where.total(), count_allocations(run), launches, where)
    slow = {kind: as_operator(run) for kind, run in runs.items() if kind != 'backward'}
    for run in slow.values():
        run()
    print(f'\n{name}')
    print(f'  {"":18s} {"calls":>6s} {"allocations":>12s} {"launches":>9s} {"as operator":>12s} '
          f'{"host time":>10s}')  # fmt: skip
    for kind, count in found.items():
        ratio = slower = ''
        if kind in slow:
            slower = count_calls(slow[kind]).total()
        if kind in slow and (stub is None or make in (scan, ordered_scan)):
            # With a stub, a mixer's projections would take most of its time.
            times = seconds({'direct': runs[kind], 'operator': slow[kind]})
            ratio = f'{times["operator"] / times["direct"]:.2f}x'
            if stub is None:
                adds = times['direct'] / seconds({'add': addition(device)}, calls=200)['add']
                ratio = f'{adds:.1f} adds, {ratio}'
        print(f'  {kind:18s} {count.calls:6d} {count.allocations:12d} {count.launches:9d} '
              f'{slower:>12} {ratio:>10s}')  # fmt: skip
    top = found['forward+backward'].where.most_common(12)
    print('  most of them: ' + ', '.join(f'{where} {n}' for where, n in top))
    return found


def addition(device) -> Callable[[], None]:
    """The unit of time on a GPU's host: one small addition."""
    x = torch.zeros(16, device=device)
    return lambda: x + x


def verdict(found: dict[str, Count]) -> tuple[bool, str]:
    """Whether a call of the scan keeps to its targets, in one line."""
    got = {
        'forward calls': found['forward'].calls,
        'forward+backward calls': found['forward+backward'].calls,
        'backward allocations': found['backward'].allocations,
    }
    parts = [f'{name} {got[name]} (at most {limit})' for name, limit in TARGETS.items()]
    kept = all(got[name] <= limit for name, limit in TARGETS.items())
    return kept, f'targets of the scan {"kept" if kept else "MISSED"}: {", ".join(parts)}'


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--stub', action='store_true', help='no GPU: replace the driver')
    parser.add_argument('--only', default='', help='regular expression for names of calls')
    args = parser.parse_args()
    if not args.stub and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; --stub counts without one')
    stub = Stub() if args.stub else None
    device = torch.device('cpu' if args.stub else 'cuda')
    found = {}
    with stub.installed() if stub else contextlib.nullcontext():
        for name, make in WORKS.items():
            if re.search(args.only, name):
                found[name] = measure(name, make, device, stub)
    if 'scan' not in found:
        return 0
    kept, line = verdict(found['scan'])
    print('\n' + line)
    return 0 if kept else 1


if __name__ == '__main__':
    sys.exit(main())
