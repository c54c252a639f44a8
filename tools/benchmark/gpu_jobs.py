"""Parts of gpu_run.py that are not benchmarks of their own: compiling, a sweep of plans, profiles.

    python tools/benchmark/gpu_jobs.py imports
    python tools/benchmark/gpu_jobs.py compile
    python tools/benchmark/gpu_jobs.py sweep --csv tools/benchmark/results/scan_plans.csv
    python tools/benchmark/gpu_jobs.py forms --csv tools/benchmark/results/scan_forms.csv
    python tools/benchmark/gpu_jobs.py profile --out FOLDER

imports loads what later parts import, many processes at a time: a machine that reads its software
for the first time takes a minute or two for it. compile runs every shape of the benchmarks once,
many processes at a time, so that whoever comes later finds the kernels in Triton's cache. sweep
times launch plans of the scan and appends them as `plans.py` reads them. forms times what else a
plan may say, each against the planner's own: whether launches overlap, and how many registers a
thread may have. --dry-run takes the CPU, interpreted, and the smallest shapes.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from timing import (
    Failures,
    TimeLimit,
    append_rows,
    as_graph,
    default_clock,
    in_sequence,
    percentiles,
    processor,
    take_turns,
)

from mmhybrid.ops import selective_scan
from mmhybrid.ops.selective_scan import plan as plans
from mmhybrid.ops.selective_scan.passes import processors

COLUMNS = ('device', 'kernels', 'shape', 'B', 'G', 'H', 'L', 'N', 'plan', 'forward_us',
           'backward_us')
BLOCKS, UNROLLS = (32, 64), (4, 8)
CHUNKS = (16, 24, 32, 48, 64, 96, 128, 192, 256)


def kernels_commit() -> str:
    """The commit that last changed the kernels, with -dirty when they differ from it."""
    folder = str(Path(plans.__file__).parent / 'kernels')

    def git(*arguments):
        done = subprocess.run(['git', '-C', folder, *arguments, '--', folder],
                              capture_output=True, text=True)
        return done.stdout.strip()

    found = git('log', '-1', '--format=%h')
    return (found or 'unknown') + ('-dirty' if git('status', '--porcelain') else '')


def tiny_scan():
    """A shape for the interpreter."""
    import ops

    return ops.Shape('tiny', 1, 9, 4, 1)


def scan_call(shape, dtype: torch.dtype, device: str) -> tuple[dict, Callable]:
    """Inputs of a shape of ops.py, and a function of them."""
    import ops

    inputs = ops.make_inputs(shape, dtype, device, 0, token_major=True)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return leaves, lambda **x: selective_scan(**x, backend='triton')


# --- imports --------------------------------------------------------------------------------------

# What parts of a run import, apart from each other.
IMPORTS = (
    'torch; torch.cuda.is_available() and torch.zeros(1, device="cuda")', 'torch._inductor.utils',
    'triton.compiler, triton.backends.nvidia.driver', 'torchvision', 'mmdet.apis', 'mmseg.apis',
    'pytest, xdist', 'timm', 'mamba_ssm', 'scipy.signal, matplotlib.pyplot',
    'cv2, pycocotools.mask', 'mmhybrid',
)


def imports_part(args) -> int:
    """Import all of it at once; what is missing is said, and is not a failure."""
    code = 'import time; t = time.time(); import {}; print(f"{{time.time() - t:6.1f}} s: {}")'
    wanted = IMPORTS[-1:] if args.dry_run else IMPORTS
    workers = {what: subprocess.Popen([sys.executable, '-c', code.format(what, what.split(';')[0])])
               for what in wanted}
    for what, worker in workers.items():
        if worker.wait():
            print(f'cannot import {what.split(";")[0]}; what needs it does not run', flush=True)
    return 0


# --- compile --------------------------------------------------------------------------------------


def compile_jobs(device: str, dry: bool) -> list[tuple[str, Callable[[], object]]]:
    """Everything that the benchmarks run, each by a name."""
    import backbone
    import mixer
    import ops
    import steps

    dtypes = [torch.float32] if dry else [torch.bfloat16, torch.float16]
    jobs = []
    for dtype, shape in itertools.product(dtypes, [tiny_scan()] if dry else ops.GPU_SHAPES):
        def scan(shape=shape, dtype=dtype):
            leaves, function = scan_call(shape, dtype, device)
            for backward in (False, True):
                ops.run(function, leaves, backward)

        jobs.append((f'scan {shape.name} {dtype}', scan))
    for shape in [mixer.Shape('tiny', 1, 5, 8)] if dry else mixer.GPU_SHAPES:
        def mixers(shape=shape):
            source = mixer.make_mixer(shape.dim, device)
            x = torch.randn(shape[1:], device=device).requires_grad_()
            autocast = None if dry else torch.bfloat16
            wanted = ['plain triton', 'fused', 'fused lean']
            for module in mixer.find_variants(source, device, wanted).values():
                for backward in (False, True):
                    mixer.run(module, x, backward, autocast)

        jobs.append((f'mixer {shape.name}', mixers))
    for name in () if dry else backbone.MODELS_OF_INTEREST:
        def whole(name=name):
            model = backbone.choose(backbone.build(name).to(device), 'triton')
            x = torch.randn(2, 3, 512, 512, device=device)
            for what in backbone.PASSES:
                backbone.step(model.train(what != 'forward'), x, what, 'bfloat16')()

        jobs.append((f'backbone {name}', whole))
    for name, case in () if dry else steps.CASES.items():
        def step(case=case):
            module, x = steps.build(case, device, False)
            module = backbone.choose(module, 'triton')
            for what in steps.PASSES:
                module.train(what != 'forward')
                steps.step_of(module, x, what, getattr(torch, case.dtype))()

        jobs.append((f'step {name}', step))
    for state in () if dry else (1, 8, 16):
        short = next(s for s in ops.GPU_SHAPES if s.state == state)._replace(length=192)
        # A sequence that is cut and one that is not are other kernels, whatever the cut.
        for cut in itertools.product(blocks_for(short), UNROLLS, (48, 192)):
            def planned(shape=short, cut=cut):
                leaves, function = scan_call(shape, torch.bfloat16, device)
                with planned_as(cut):
                    for backward in (False, True):
                        ops.run(function, leaves, backward)

            jobs.append((f'plan {cut} N {state}', planned))
    return jobs


def compile_part(args) -> int:
    """One process's share of the jobs, or as many processes as there are cores."""
    if args.worker:
        number, count = map(int, args.worker.split('/'))
        failures = Failures()
        for name, job in compile_jobs(args.device, args.dry_run)[number::count]:
            with failures.noted(name):
                job()
                print(f'compiled: {name}', flush=True)
        return int(bool(failures))
    count = args.processes or min(16, os.cpu_count() or 1)
    command = [sys.executable, __file__, 'compile', '--device', args.device]
    command += ['--dry-run'] * args.dry_run
    workers = [subprocess.Popen([*command, '--worker', f'{i}/{count}']) for i in range(count)]
    codes = [worker.wait() for worker in workers]
    return int(any(codes))


# --- sweep ----------------------------------------------------------------------------------------


def sweep_shapes(dry: bool) -> Iterator:
    """Shapes of ops.py, the kinds that have not been measured first."""
    if dry:
        return iter([tiny_scan()])
    import ops

    more = (
        ops.Shape('LocalVMamba-T 512 stage 1', 2, 16384, 384, 1),
        ops.Shape('LocalVMamba-S 512 stage 3', 2, 1024, 1536, 1),
    )
    new = ('Vim', '-S ', '-B ')
    first = [s for s in ops.GPU_SHAPES if any(name in s.name for name in new)]
    return iter([*more, *first, *(s for s in ops.GPU_SHAPES if s not in first)])


def candidates(shape, args) -> list[tuple[int, int, int]]:
    """(block, unroll, chunk) to be timed, the planner's own first."""
    chunks = sorted({min(chunk, shape.length) for chunk in (*CHUNKS, shape.length)})
    if shape.length > 4096:
        chunks = [chunk for chunk in chunks if chunk < shape.length]  # whole, it takes milliseconds
    found = list(itertools.product(blocks_for(shape), UNROLLS, chunks))
    own = own_cuts(shape, args.device)
    return own + [cut for cut in found if cut not in own][: 1 if args.dry_run else None]


def blocks_for(shape) -> list[int]:
    """Blocks that the states of a shape leave registers for."""
    return [block for block in BLOCKS if block == 32 or shape.state <= 8]


def own_cuts(shape, device: str) -> list[tuple[int, int, int]]:
    """(block, unroll, chunk) of both passes as the planner has them, without and with gradients."""
    found = []
    for gradients in (False, True):
        plan = plans.launch_plan(
            shape.batch, 1, shape.channels, shape.length, shape.state,
            processors(torch.device(device)),
            gradients=gradients,
        )
        for cut in (plan.forward, plan.backward)[: 1 + gradients]:
            own = cut.block, cut.unroll, min(plan.chunk, shape.length)
            if own not in found:
                found.append(own)
    return found


def forced(block: int, unroll: int, chunk: int):
    """A context in which every scan has this plan."""
    own = plans.launch_plan

    def plan(batch, groups, group_dim, length, *sizes, **options):
        found = own(batch, groups, group_dim, length, *sizes, **options)
        whole = -(-min(chunk, length) // unroll) * unroll
        cut = dict(block=block, unroll=unroll)
        return found._replace(
            chunk=whole, n_chunks=-(-length // whole), forward=found.forward._replace(**cut),
            backward=found.backward._replace(**cut),
        )

    return mock.patch.object(plans, 'launch_plan', plan)


@contextlib.contextmanager
def planned_as(cut: tuple[int, int, int]):
    """A context in which every scan has this plan, also one whose kind is known already."""
    forget_kinds()
    try:
        with forced(*cut):
            yield
    finally:
        forget_kinds()


def forget_kinds() -> None:
    """Let the scan work every call out again, under another plan."""
    from mmhybrid.ops.selective_scan import launch  # noqa: F401  (the module of the records)

    for name in ('triton_backend', 'fused'):
        module = sys.modules.get(f'mmhybrid.ops.selective_scan.{name}')
        if module is not None:
            module.forget()


def forward_and_both(shape, args) -> tuple[float, float]:
    """Microseconds of a forward pass, and of one with its backward pass."""
    import ops

    capture = as_graph if args.device == 'cuda' else in_sequence
    leaves, function = scan_call(shape, args.dtype, args.device)
    works = {
        backward: capture(
            [lambda b=backward: ops.run(function, leaves, b)] * (1 if args.dry_run else 4)
        )
        for backward in (False, True)
    }
    times = take_turns(works, 1 if args.dry_run else 7, default_clock(args.device), seconds=0.5)
    forward, both = (float(percentiles(times[backward])['p50_ms']) * 1e3 for backward in works)
    return forward, both


def sweep_row(shape, cut: tuple[int, int, int], args) -> dict:
    """Time one plan: a forward pass, and what a backward pass adds."""
    with planned_as(cut):
        forward, both = forward_and_both(shape, args)
    return {
        'device': processor(args.device), 'kernels': args.kernels, 'shape': shape.name,
        'B': shape.batch, 'G': 1, 'H': shape.channels, 'L': shape.length, 'N': shape.state,
        'plan': 'b{} u{} c{}'.format(*cut), 'forward_us': f'{forward:.2f}',
        'backward_us': f'{both - forward:.2f}',
    }


def sweep_part(args) -> int:
    """Time all plans of all shapes, each in the file as soon as it is known."""
    append_rows(args.csv, COLUMNS, [])
    failures, limit = Failures(), TimeLimit(args.minutes)
    for shape in sweep_shapes(args.dry_run):
        if limit.passed(shape.name):
            continue
        best: dict[str, tuple[float, str]] = {}
        for cut in candidates(shape, args):
            with failures.noted(f'{shape.name}: b{cut[0]} u{cut[1]} c{cut[2]}'):
                row = sweep_row(shape, cut, args)
                append_rows(args.csv, COLUMNS, [row])
                for name in ('forward_us', 'backward_us'):
                    best[name] = min(best.get(name, (float('inf'), '')),
                                     (float(row[name]), row['plan']))
        said = ', '.join(f'best {name} {value:g} ({cut})' for name, (value, cut) in best.items())
        print(f'{shape.name}: {said}', flush=True)
    return int(bool(failures))


# --- forms ----------------------------------------------------------------------------------------


#: What of a plan no model of the time decides, beside the planner's own.
FORMS = {
    'as planned': {},
    'launches overlap': dict(overlap=True),
    'forward with 96 registers': dict(forward=dict(registers=96)),
    'backward with 168 registers': dict(backward=dict(registers=168)),
}
_FORM_COLUMNS = ('device', 'shape', 'form', 'forward_us', 'both_us')


@contextlib.contextmanager
def formed(overlap: bool = False, **cuts: dict):
    """A context in which every scan has its own plan with these changes."""
    own = plans.launch_plan

    def plan(*sizes, **options):
        found = own(*sizes, **options)
        changed = {name: getattr(found, name)._replace(**new) for name, new in cuts.items()}
        return found._replace(overlap=overlap, **changed)

    forget_kinds()
    try:
        with mock.patch.object(plans, 'launch_plan', plan):
            yield
    finally:
        forget_kinds()


def can_overlap(device: str) -> bool:
    """Whether launches may overlap: from compute capability 9.0 on."""
    return device == 'cuda' and torch.cuda.get_device_capability()[0] >= 9


def forms_part(args) -> int:
    """Time every form of every shape's own plan, in turns of shapes."""
    import ops

    append_rows(args.csv, _FORM_COLUMNS, [])
    failures, limit = Failures(), TimeLimit(args.minutes)
    for shape in [tiny_scan()] if args.dry_run else ops.GPU_SHAPES:
        if limit.passed(shape.name):
            continue
        for form, changes in FORMS.items():
            if changes.get('overlap') and not can_overlap(args.device):
                continue
            with failures.noted(f'{shape.name}: {form}'), formed(**changes):
                forward, both = forward_and_both(shape, args)
                append_rows(args.csv, _FORM_COLUMNS, [{
                    'device': processor(args.device), 'shape': shape.name, 'form': form,
                    'forward_us': f'{forward:.2f}', 'both_us': f'{both:.2f}',
                }])
                print(f'{shape.name}, {form}: {forward:.1f} / {both:.1f} us', flush=True)
    return int(bool(failures))


# --- profile --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A training step of two images that is profiled.

    Attributes:
        model: CLASS:ARCH of backbone.py.
        size: (H, W) of the images.
        dtype: of autocast.
        backend: of the scans.
        most: kernel launches that it may take; None where there is no target.
        arguments: of the model.
    """

    model: str
    size: tuple[int, int]
    dtype: str = 'bfloat16'
    backend: str = 'triton'
    most: int | None = None
    arguments: dict = {}  # noqa: RUF012  (never changed)


_DETECTION = dict(size=(832, 1344), dtype='float16', arguments=dict(window_size=(8, 8, 112, 56)))
STEPS = {
    'MambaVision-T detection': Step('MambaVision:tiny', most=750, **_DETECTION),
    'MambaVision-T detection, tight windows': Step('MambaVision:tiny', **(
        _DETECTION | dict(arguments=_DETECTION['arguments'] | dict(windows='tight')))),
    'MambaVision-T segmentation': Step('MambaVision:tiny', (512, 512), 'float16',
                                       arguments=dict(window_size=(8, 8, 64, 32))),
    'VMamba-T segmentation': Step('VMamba:tiny', (512, 512), most=850),
    'LocalVMamba-T segmentation': Step('LocalVMamba:tiny', (512, 512)),
    'Vim-Ti segmentation': Step('Vim:tiny', (512, 512)),
    'LocalVim-T segmentation': Step('LocalVim:tiny', (512, 512)),
}
LAUNCHES = ('device', 'step', 'dtype', 'launches', 'most', 'kernels_us')


def profile_part(args) -> int:
    """Where a training step's time goes, a table for each model, and how often it launches."""
    import backbone
    from torch.profiler import ProfilerActivity, profile

    steps = {'tiny': Step('Vim:tiny', (32, 32), 'float32', 'torch')} if args.dry_run else STEPS
    activities = [ProfilerActivity.CPU]
    if args.device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    failures, counted = Failures(), args.out / 'launches.csv'
    for name, about in steps.items():
        with failures.noted(name):
            model = backbone.build(about.model, about.arguments).to(args.device)
            model = backbone.choose(model, about.backend).train()
            x = torch.randn(1 if args.dry_run else 2, 3, *about.size, device=args.device)
            step = backbone.step(model, x, backbone.PASSES[1], about.dtype)
            for _ in range(1 if args.dry_run else 4):
                step()
            with profile(activities=activities) as profiler:
                step()
                if args.device == 'cuda':
                    torch.cuda.synchronize()
            by = 'self_device_time_total' if args.device == 'cuda' else 'self_cpu_time_total'
            averages = profiler.key_averages()
            table = averages.table(sort_by=by, row_limit=40)
            path = args.out / f'profile_{name.replace(", ", "_").replace(" ", "_")}.txt'
            height, width = about.size
            what = f'{name}, {height} x {width}, {about.dtype}, a training step'
            path.write_text(f'{processor(args.device)}, {what}\n\n{table}\n')
            if args.device == 'cuda':
                launches, microseconds = kernels_of(averages)
                append_rows(counted, LAUNCHES, [{
                    'device': processor(args.device), 'step': name, 'dtype': about.dtype,
                    'launches': launches, 'most': about.most or '',
                    'kernels_us': f'{microseconds:.0f}',
                }])
                print(f'{what}: {launches} launches', flush=True)
            print(f'wrote {path}', flush=True)
    return int(bool(failures))


def kernels_of(averages) -> tuple[int, float]:
    """Kernels that a GPU ran and their microseconds; copies and fills of memory are none."""
    kernels = [
        event for event in averages
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.key.startswith(('Memcpy', 'Memset'))
    ]
    return (sum(event.count for event in kernels),
            sum(event.self_device_time_total for event in kernels))


def main(arguments=None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {'imports': imports_part, 'compile': compile_part, 'sweep': sweep_part,
             'forms': forms_part, 'profile': profile_part}
    parser.add_argument('part', choices=parts)
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda, in a dry run cpu')
    parser.add_argument('--csv', metavar='PATH', help='where sweep and forms append rows')
    parser.add_argument('--out', metavar='FOLDER', type=Path, help='where profile writes')
    parser.add_argument('--kernels', default=kernels_commit(),
                        help='name of the kernels in the rows (default: their last commit)')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='sweep and forms: begin no further shape after these')
    parser.add_argument('--processes', type=int, help='that compile (default: one per core)')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.device = args.device or ('cpu' if args.dry_run else 'cuda')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; --dry-run tries everything on a CPU')
    if args.part in ('sweep', 'forms') and not args.csv:
        parser.error(f'{args.part} needs --csv for its rows')
    if args.part == 'profile' and not args.out:
        parser.error('profile needs --out for its tables')
    args.dtype = torch.float32 if args.dry_run else torch.bfloat16
    return parts[args.part](args)


if __name__ == '__main__':
    sys.exit(main())
