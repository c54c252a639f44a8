"""Count what a call of the scan or of a mixer costs the host: calls, allocations, launches, time.

    python tools/benchmark/host.py
    python tools/benchmark/host.py --stub

On a GPU a call's time on the host is given in launches of one addition of PyTorch's, next to which
the machine's speed falls away. With --stub no GPU is needed: all Python of ours and of Triton's
runs, kernels are compiled for sm_90, and what needs a driver (loading, streams, the launch itself)
is replaced by functions that take notes; the tensors lie on the CPU. The same call as an operator
with ordinary launches, which is how every call went up to commit 03c1dbf and how calls under a
compiler still go, is measured in the same turns. Mixers run as recipes train them: float32
parameters under autocast to bfloat16.

Below each table calls and time (as a profiler sees it) stand by what they are for: "checks"
describe a call and choose who computes it, "planning" is what a kind of call needs once,
"allocation" makes tensors and views, "binding" hands addresses to launchers, "autograd" is its
functions and its engine, "operators" are PyTorch's own, such as matrix products, and "modules" are
layers and the lookup of parameters. With --stub the times of operators, and of autograd where it
calls them, are those of a CPU's arithmetic.

The last line holds the targets; the exit code is 1 when one is missed.
"""

import argparse
import collections
import contextlib
import cProfile
import pstats
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from mmhybrid.layers import (
    SS2D,
    LocalSS2D,
    LocalVimMixer,
    MambaVisionMixer,
    VimMixer,
    decay_rates,
    prepare_mixers,
)
from mmhybrid.ops import (
    mambavision_mixer,
    selective_scan,
    selective_scan_ordered,
    triton_support,
)
from mmhybrid.ops.selective_scan import launch
from mmhybrid.ops.walk_conv import walk_conv


class Target(NamedTuple):
    """The most that one call may cost; calls are those of Python and built-in functions."""

    forward_calls: int
    both_calls: int
    backward_allocations: int


#: What must not grow. The scan's are set, the others are what was reached.
TARGETS = {
    'scan': Target(60, 170, 2),
    'ordered scan': Target(60, 185, 2),
    'walk convolution': Target(45, 150, 5),
    'MambaVisionMixer': Target(130, 335, 36),
    'MambaVisionMixer lean': Target(130, 340, 41),
    'SS2D': Target(245, 495, 36),
    'LocalSS2D': Target(365, 720, 72),
    'VimMixer': Target(115, 335, 31),
    'LocalVimMixer': Target(150, 365, 44),
}


#: What a call is made of, in the order in which it is shown.
PARTS = ('checks', 'planning', 'allocation', 'binding', 'autograd', 'operators', 'modules')


class Stub:
    """A driver and launchers that take notes instead of using a GPU.

    Args:
        build_launchers: whether Triton's C module of each launcher is built, though not used.
    """

    def __init__(self, build_launchers: bool = False):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher

        stub = self
        self.launches = 0

        class Launcher(CudaLauncher):
            """The launcher around the C function, without the C function."""

            def __init__(self, src, metadata):
                if build_launchers:
                    super().__init__(src, metadata)
                names = (
                    'global_scratch_size', 'global_scratch_align', 'profile_scratch_size',
                    'profile_scratch_align', 'launch_cooperative_grid', 'launch_pdl',
                )
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
            mock.patch.object(
                mambavision_mixer, 'unsupported_reason', lambda device, dtype, state: None
            ),
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
    )
    B, C = (
        torch.randn(batch, groups, 1, length, device=device, dtype=torch.bfloat16)
        .requires_grad_() for _ in range(2)
    )
    channels = groups * group_dim
    A, D, bias = parameters(device, (channels, 1), (channels,), (channels,))
    order = torch.stack([torch.randperm(length) for _ in range(groups)]).int().to(device)

    def run():
        return selective_scan_ordered(
            u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, order=order,
            backend='triton',
        )

    return Work(run, [u, delta, A, B, C, D, bias])


def convolution(device) -> Work:
    """The convolution of a small Vim along both senses of its sequence."""
    batch, walks, channels, length = 2, 2, 384, 197
    u = tokens(device, batch, length, channels)
    weight, bias = parameters(device, (walks, channels, 4), (walks, channels))
    slots = torch.arange(length, device=device, dtype=torch.int32)
    slots = torch.stack([slots, slots.flip(0)])  # each is its own inverse
    return Work(lambda: walk_conv(u, weight, bias, slots, slots), [u, weight, bias])


def mixer(make: Callable[[], torch.nn.Module], shape: tuple[int, ...], *rest):
    """A mixer of a network, by its class."""

    def work(device) -> Work:
        module = make().to(device)
        x = torch.randn(shape, device=device).requires_grad_()
        return Work(lambda: module(x, *rest), [x, *module.parameters()])

    return work


def prepared_mixer(make: Callable[[], torch.nn.Module], shape: tuple[int, ...], grid):
    """A mixer of a plain network, which prepares the weights of all its mixers together."""

    def work(device) -> Work:
        module = make().to(device)
        x = torch.randn(shape, device=device).requires_grad_()
        ((weights, *tables),) = prepare_mixers([module], x, grid)
        weights = [w.detach().requires_grad_() for w in weights]
        leaves = [x, module.in_proj.weight, module.out_proj.weight, *weights]
        return Work(lambda: module(x, grid, (weights, *tables)), leaves)

    return work


def prepared_ss2d(make: Callable[[], torch.nn.Module], shape: tuple[int, ...]):
    """A mixer of a staged network, which computes the decay rates of all its mixers together."""

    def work(device) -> Work:
        module = make().to(device)
        x = torch.randn(shape, device=device).requires_grad_()
        (rates,) = (rate.detach().requires_grad_() for rate in decay_rates([module.A_logs]))
        leaves = [p for p in module.parameters() if p is not module.A_logs]
        return Work(lambda: module(x, rates), [x, rates, *leaves])

    return work


WORKS = {
    'scan': scan,
    'ordered scan': ordered_scan,
    'walk convolution': convolution,
    'MambaVisionMixer': mixer(
        lambda: MambaVisionMixer(640, fused=True, backend='triton'), (2, 64, 640)
    ),
    'MambaVisionMixer lean': mixer(
        lambda: MambaVisionMixer(640, fused=True, backend='triton', lean=True), (2, 64, 640)
    ),
    'SS2D': prepared_ss2d(lambda: SS2D(96, state_dim=1, backend='triton'), (2, 16, 16, 96)),
    'LocalSS2D': prepared_ss2d(
        lambda: LocalSS2D(96, ('h', 'v_flip', 'w7'), state_dim=1, float32_scan=True,
                          backend='triton'), (2, 14, 14, 96)
    ),
    'VimMixer': prepared_mixer(
        lambda: VimMixer(192, backend='triton'), (1, 65, 192), (5, 13)
    ),
    'LocalVimMixer': prepared_mixer(
        lambda: LocalVimMixer(192, ('h', 'v', 'w2'), backend='triton'), (1, 64, 192), (8, 8)
    ),
}
#: Those that autocast does not touch and whose time, without a GPU, is mostly the host's.
ALONE = (scan, ordered_scan, convolution)


class Count(NamedTuple):
    """What one call costs; ``where`` counts calls by file or, for built-in ones, by name."""

    calls: int
    operators: int
    allocations: int
    launches: int
    where: collections.Counter


def passes_of(work: Work) -> dict[str, Callable[[], None]]:
    """The forward pass without and with gradients, and both passes; see :func:`mode`."""

    y = work.run()
    dy = torch.ones_like(y)

    def both():
        torch.autograd.grad(work.run(), work.leaves, dy, allow_unused=True)

    def backward():
        torch.autograd.grad(y, work.leaves, dy, allow_unused=True, retain_graph=True)

    return {'no grad': work.run, 'forward': work.run, 'backward': backward,
            'forward+backward': both}


def mode(kind: str) -> torch.set_grad_enabled:
    """In which a pass is run; to enter and to leave it are not calls of the pass."""
    return torch.set_grad_enabled(kind != 'no grad')


def count_calls(run: Callable[[], None]) -> collections.Counter:
    """Calls of Python functions by file, and of built-in ones by name."""
    found = collections.Counter()

    def note(frame, event, argument):
        if event == 'call':
            found[Path(frame.f_code.co_filename).name] += 1
        elif event == 'c_call':
            found[argument.__name__] += 1

    with torch.autograd.set_multithreading_enabled(False):  # the backward pass here as well
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
    found['setprofile'] -= 1
    return +found


# By the name of a function of Python's, or by its file; what is in neither belongs to its caller.
_BY_NAME = dict.fromkeys(
    ('describe', 'eager', 'intercepted', 'prepared', '_may_be_nowhere', 'is_compiling', '_check',
     'takes', 'choose_backend', 'path', 'reason', 'unsupported_reason', 'unavailable_reason',
     'not_default_reason', 'reads_tables',
     '_wish_of_environment', 'is_scripting', 'is_tracing'), 'checks',
) | dict.fromkeys(('launch_plan', '_own_choice', 'find', 'remember'), 'planning') | dict.fromkeys(
    ('_direct', '_bind', 'launch', 'get_stream', 'get_device', 'device_of'), 'binding'
) | dict.fromkeys(('grad', 'apply', 'backward'), 'autograd')
_BY_FILE = {
    'plan.py': 'planning', 'launch.py': 'binding', 'passes.py': 'allocation',
    'graph.py': 'autograd', 'function.py': 'autograd', 'grad_mode.py': 'autograd',
    'module.py': 'modules', 'mambavision.py': 'modules', 'ss2d.py': 'modules', 'vim.py': 'modules',
    'localvim.py': 'modules', 'directional.py': 'modules',
}
# Built-in functions, by their names.
_BUILT_IN = dict.fromkeys(
    ('new_empty', 'new_empty_strided', 'empty', 'empty_like', 'as_strided', 'view', 'split',
     'split_with_sizes', 'unsqueeze', 'reshape', 't', 'expand', 'unflatten', 'flatten',
     'transpose', 'permute', 'chunk', 'unbind', 'detach'), 'allocation',
) | {'data_ptr': 'binding', 'save_for_backward': 'autograd', 'run_backward': 'autograd',
     'apply': 'autograd'}
_OF_TORCH = re.compile(r'torch\._C|built-in method torch')


def part_of(function: tuple[str, int, str], caller: tuple[str, int, str] | None) -> str | None:
    """What a function as the profiler names it is for; None where its caller decides."""
    file, _, name = function
    if file != '~':
        return _BY_NAME.get(name) or _BY_FILE.get(Path(file).name)
    if caller is not None and part_of(caller, None) == 'checks':
        return 'checks'
    short = re.search(r"method '?([\w.]+)", name)
    short = short[1].split('.')[-1] if short else name
    return _BUILT_IN.get(short) or ('operators' if _OF_TORCH.search(name) else None)


def parts(run: Callable[[], None], calls: int = 20) -> dict[str, tuple[float, float]]:
    """Calls of functions, and share of the time under the profiler, by what they are for."""
    profile = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        for _ in range(calls):
            run()
        profile.disable()
    stats = pstats.Stats(profile).stats
    counts, times = collections.Counter(), collections.Counter()
    for function, (_, _, _, _, callers) in stats.items():
        for caller, (_, number, own, _) in callers.items():
            part = part_of(function, caller) or _of_callers(caller, stats)
            counts[part] += number / calls
            times[part] += own
    whole = sum(times.values()) or 1
    return {part: (counts[part], times[part] / whole) for part in PARTS}


def _of_callers(function, stats, seen=frozenset()) -> str:
    """The part of whoever calls a function most, directly or through others."""
    part = part_of(function, None)
    if part is not None:
        return part
    callers = {c: n for c, (_, n, _, _) in stats[function][4].items() if c not in seen}
    if not callers:
        return 'modules'
    return _of_callers(max(callers, key=callers.get), stats, seen | {function})


def count_in_profile(run: Callable[[], None]) -> tuple[int, int]:
    """Blocks of memory that PyTorch's allocators hand out, and its operators with inner ones."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return (
        sum(event.name() == '[memory]' and event.nbytes() > 0 for event in events),
        sum(event.name().startswith('aten::') for event in events),
    )


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

    eager, direct = launch.eager, launch.Program._direct

    def through():
        launch.eager = launch.Program._direct = never
        try:
            run()
        finally:
            launch.eager, launch.Program._direct = eager, direct

    return through


def never(*_) -> bool:
    """No, whatever is asked."""
    return False


def measure(name: str, make, device, stub: Stub | None) -> dict[str, Count]:
    """Every pass of one kind of call, directly."""
    if make in ALONE:
        return _measure(name, make, device, stub)
    # A network casts each weight once per pass, so none may be found in autocast's cache.
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        return _measure(name, make, device, stub)


def count_pass(run: Callable[[], None], stub: Stub | None) -> Count:
    """What one run costs."""
    where = count_calls(run)
    before = stub.launches if stub else 0
    run()
    launches = stub.launches - before if stub else 0
    allocations, operators = count_in_profile(run)
    return Count(where.total(), operators, allocations, launches, where)


def _measure(name: str, make, device, stub: Stub | None) -> dict[str, Count]:
    found = {}
    runs = passes_of(make(device))
    slow = {kind: as_operator(run) for kind, run in runs.items() if kind != 'backward'}
    for _ in range(3):  # compiles, notes what reaches the launchers, and goes past Triton
        for kind, run in runs.items():
            with mode(kind):
                run()
    print(f'\n{name}')
    print(f'  {"":18s} {"calls":>6s} {"operators":>10s} {"allocations":>12s} {"launches":>9s} '
          f'{"as operator":>12s} {"host time":>10s}')
    purposes = []
    for kind, run in runs.items():
        with mode(kind):
            count = found[kind] = count_pass(run, stub)
            ratio = slower = ''
            adds = None
            if kind in slow:
                slow[kind]()
                slower = count_calls(slow[kind]).total()
            if kind in slow and (stub is None or make in ALONE):
                # With a stub, a mixer's projections would take most of its time.
                times = seconds({'direct': run, 'operator': slow[kind]})
                ratio = f'{times["operator"] / times["direct"]:.2f}x'
                if stub is None:
                    one = seconds({'add': addition(device)}, calls=200)['add']
                    adds = times['direct'] / one
                    ratio = f'{adds:.1f} adds, {ratio}'
            if kind in slow:
                purposes.append(f'  {kind}: {show(parts(run), adds)}')
        print(f'  {kind:18s} {count.calls:6d} {count.operators:10d} {count.allocations:12d} '
              f'{count.launches:9d} {slower:>12} {ratio:>10s}')
    print(*purposes, sep='\n')
    top = found['forward+backward'].where.most_common(12)
    print('  most of them: ' + ', '.join(f'{where} {n}' for where, n in top))
    return found


def show(found: dict[str, tuple[float, float]], adds: float | None) -> str:
    """Calls by what they are for, with their share of the time or, on a GPU, in additions."""
    def time(share):
        return f'{share:.0%}' if adds is None else f'{share * adds:.1f} adds'

    return ', '.join(
        f'{part} {calls:.0f} ({time(share)})' for part, (calls, share) in found.items()
    )


def addition(device) -> Callable[[], None]:
    """The unit of time on a GPU's host: one small addition."""
    x = torch.zeros(16, device=device)
    return lambda: x + x


def forward_kinds(name: str) -> tuple[str, ...]:
    """Forward passes that keep to the target.

    Without gradients layers ask whether oneDNN takes their input, at length where tensors lie on a
    CPU, as a stub's do; so mixers count with gradients alone.
    """
    return ('no grad', 'forward') if WORKS[name] in ALONE else ('forward',)


def verdict(found: dict[str, dict[str, Count]]) -> tuple[bool, str]:
    """Whether calls keep to their targets, in one line."""
    kept, lines = True, []
    for name, counts in found.items():
        got = Target(
            max(counts[kind].calls for kind in forward_kinds(name)),
            counts['forward+backward'].calls, counts['backward'].allocations,
        )
        most = TARGETS[name]
        kept &= all(n <= limit for n, limit in zip(got, most, strict=True))
        words = ('forward calls', 'forward+backward calls', 'backward allocations')
        lines.append(f'{name}: ' + ', '.join(
            f'{word} {n} (at most {limit})'
            for word, n, limit in zip(words, got, most, strict=True)
        ))
    return kept, f'targets {"kept" if kept else "MISSED"}: {"; ".join(lines)}'


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
    if not found:
        parser.error(f'--only {args.only} is in no name; there are {", ".join(WORKS)}')
    kept, line = verdict(found)
    print('\n' + line)
    return 0 if kept else 1


if __name__ == '__main__':
    sys.exit(main())
