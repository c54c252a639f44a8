"""Find which versions of Triton run our kernels: interpreted, and compiled for sm_80 and sm_90.

    python tools/benchmark/triton_versions.py
    python tools/benchmark/triton_versions.py 3.1.0 3.2.0 --csv FILE
    python tools/benchmark/triton_versions.py --here

Every version is installed by itself in a temporary folder that is in front of the present
environment's packages (about 0.6 GB, removed before the next), so the torch is that of the present
environment; ``--here`` takes its Triton as well. With each, a few cases of every family of
kernels run in Triton's interpreter, and the launches of the same families in mixed precision go
through Triton's own binding and compiler, with a stand-in for the driver: no GPU is needed, and
none is used. Kernels are tried as they are written and, where that fails, written out without
tuples as ``mmhybrid/ops/unrolled.py`` does. Takes a few minutes a version.
"""

import argparse
import contextlib
import csv
import datetime
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from timing import commit

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / 'results' / 'triton_versions.csv'
#: The last Triton that was released for each of torch 2.4 to 2.10; torch 2.11 has 3.6 as well.
OF_TORCH = {
    '3.0.0': '2.4', '3.1.0': '2.5', '3.2.0': '2.6', '3.3.1': '2.7', '3.4.0': '2.8',
    '3.5.1': '2.9', '3.6.0': '2.10, 2.11',
}
MODULES = (
    'mmhybrid.ops.selective_scan.kernels', 'mmhybrid.ops.mambavision_mixer.triton_kernels',
    'mmhybrid.ops.walk_conv.triton_kernels', 'mmhybrid.ops.walk_scan.triton_kernels',
    'mmhybrid.ops.layer_norm.triton_kernels', 'mmhybrid.ops.map_conv.triton_kernels',
    'mmhybrid.ops.merge_norm.triton_kernels',
)
CASES = {
    'triton_cases.py': 'L2-N5-G2 or same_bits',
    'mixer_cases.py': 'test_every_gradient and 21-12-True',
    'walk_cases.py': 'test_cross_scan and 1-h-2 or test_walk_conv and size1',
    'norm_cases.py': 'test_the_same_bits_every_time or test_mixed_dtypes',
}
CAPABILITIES = (80, 90)
FORMS = ('written', 'written out')
COLUMNS = (
    'triton', 'of_torch', 'form', 'passed', 'failed', 'first_failure',
    *(f'sm_{x}_{what}' for x in CAPABILITIES for what in ('compiled', 'refused', 'first_refusal')),
    'torch', 'numpy', 'python', 'commit', 'date',
)


# One version --------------------------------------------------------------------------------------


@contextlib.contextmanager
def installed(version: str) -> Iterator[str]:
    """A temporary folder with one Triton and nothing else, except for the NumPy that it needs."""
    with tempfile.TemporaryDirectory(prefix='triton-') as folder:
        # The interpreter of the first two writes into copies with NumPy 2.
        more = ['numpy<2'] if version.startswith(('3.0.', '3.1.')) else []
        pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', folder]
        subprocess.run([*pip, f'triton=={version}', *more], check=True)
        yield folder


def attempt(folder: str | None, form: str, records: Path) -> dict:
    """The row of one form of the kernels under one Triton."""
    with tempfile.TemporaryDirectory(prefix='triton-cache-') as cache:
        paths = [x for x in (folder, str(ROOT)) if x]
        environment = os.environ | {
            'PYTHONPATH': os.pathsep.join(paths), 'OMP_NUM_THREADS': '1',
            'TRITON_CACHE_DIR': cache,
        }
        found = {'form': form} | run_cases(form, environment)
        script = [sys.executable, __file__, '--form', form, '--compile', str(records)]
        done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return found | {'sm_80_first_refusal': last_line(done.stderr)}
    return found | json.loads(done.stdout.splitlines()[-1])


def run_cases(form: str, environment: dict[str, str]) -> dict:
    """How many cases passed and failed in the interpreter, and the first failure."""
    passed, failed, first = 0, 0, ''
    for file, selection in CASES.items():
        script = [sys.executable, __file__, '--form', form, '--cases', file, selection]
        done = subprocess.run(
            script, env=environment | {'TRITON_INTERPRET': '1'}, cwd=ROOT, capture_output=True,
            text=True,
        )
        summary = last_line(done.stdout)
        counts = {word: int(n) for n, word in re.findall(r'(\d+) (passed|failed|error)', summary)}
        passed += counts.get('passed', 0)
        failed += sum(n for word, n in counts.items() if word != 'passed')
        errors = re.findall(r'^E +(\S.*)', done.stdout, re.MULTILINE)
        if not counts:
            failed, errors = failed + 1, [summary or last_line(done.stderr)]
        first = first or (f'{file}: {errors[0]}'[:160] if errors else '')
    return {'passed': passed, 'failed': failed, 'first_failure': first}


def last_line(text: str) -> str:
    """The last line of some output, cut to fit a table."""
    lines = text.strip().splitlines()
    return lines[-1][:160] if lines else ''


# In a process of its own --------------------------------------------------------------------------


def take_form(form: str) -> None:
    """Have the kernels as they are written, or all of them written out, whatever the version."""
    unrolled = importlib.import_module('mmhybrid.ops.unrolled')
    unrolled.WITH_TUPLES = (0,) if form == 'written' else (1 << 30,)
    importlib.import_module('mmhybrid.ops.triton_support').MINIMUM_TRITON = (0, 0)


def cases(file: str, selection: str) -> int:
    """Run the selected cases of a file; pytest's exit code."""
    import pytest

    path = ROOT / 'tests' / 'test_ops' / file
    return pytest.main([
        str(path), '-q', '-p', 'no:cacheprovider', '-m', 'not slow', '-k', selection,
    ])


class Recorder:
    """Stands in for a kernel: notes its launches and computes nothing."""

    def __init__(self, module: str, name: str, notes: list):
        self.place, self.notes = (module, name), notes

    def __getitem__(self, grid):
        def launch(**arguments):
            import torch

            plain = {
                k: str(x.dtype) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()
            }
            tensors = [k for k, x in arguments.items() if isinstance(x, torch.Tensor)]
            self.notes.append((*self.place, tuple(grid), plain, tensors))

        return launch


def record(path: str) -> None:
    """Note the launches of every family in mixed precision, without running them."""
    import torch

    from mmhybrid.layers import SS2D, LocalVimMixer, MambaVisionMixer
    from mmhybrid.ops import selective_scan
    from mmhybrid.ops.layer_norm import add_norm

    notes = []
    for name in MODULES:
        module = importlib.import_module(name)
        for kernel in [x for x in vars(module) if x.endswith('_kernel')]:
            setattr(module, kernel, Recorder(name, kernel, notes))

    def run(module, *inputs):
        with torch.autocast('cpu', torch.bfloat16):
            module(*inputs).float().sum().backward()

    tokens = torch.randn(2, 1024, 64)
    run(MambaVisionMixer(64, fused=True), tokens)
    run(SS2D(64, backend='triton'), tokens.unflatten(1, (32, 32)))
    walks = ('h', 'v_flip')
    run(LocalVimMixer(64, walks, state_dim=2, backend='triton'), tokens, (32, 32))
    u = torch.randn(2, 49, 64).mT.requires_grad_()
    B = torch.randn(2, 49, 8).mT
    y, last = selective_scan(
        u, u, -torch.rand(64, 8), B, B, torch.ones(64), u, torch.ones(64), True, True,
        backend='triton',
    )
    (y.sum() + last.sum()).backward()
    weight = torch.ones(64, requires_grad=True)
    total, normed = add_norm(tokens, tokens.bfloat16(), weight, weight, 1e-5, torch.bfloat16)
    (total.sum() + normed.sum()).backward()
    Path(path).write_bytes(pickle.dumps(notes))


class Driver:
    """Says that there is a GPU of one kind."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget('cuda', capability, 32)

    def get_current_target(self):
        """What Triton compiles for."""
        return self.target

    def get_current_device(self):
        """A number by which Triton keeps kernels apart."""
        return self.target.arch

    def get_current_stream(self, device):
        """A stream that nothing is put into."""
        return 0


def compile_all(path: str) -> dict:
    """Compile the noted launches for each kind of GPU; how many kernels that made, and how not."""
    import torch
    import triton

    from mmhybrid.ops.unrolled import Unrolled

    found = {}
    for capability in CAPABILITIES:
        triton.runtime.driver.set_active(Driver(capability))
        made, refused = set(), []
        for module, name, grid, arguments, tensors in pickle.loads(Path(path).read_bytes()):
            arguments = arguments | {
                k: torch.empty(0, dtype=getattr(torch, arguments[k].split('.')[1]), device='meta')
                for k in tensors
            }
            kernel = getattr(importlib.import_module(module), name)
            try:
                if isinstance(kernel, Unrolled):
                    kernel, arguments = kernel.of(arguments)
                done = kernel.run(grid=grid, warmup=True, **arguments)
                assert done.asm['cubin']
                made.add((name, done.hash))
            except Exception as error:  # of the compiler under test, whatever it is
                cause = last_line(str(error)) or type(error).__name__
                refused.append(f'{name}: {cause}')
        found |= {
            f'sm_{capability}_compiled': len(made), f'sm_{capability}_refused': len(refused),
            f'sm_{capability}_first_refusal': refused[0] if refused else '',
        }
    return found


# All versions -------------------------------------------------------------------------------------


def versions_here(folder: str | None) -> dict:
    """The versions that a process with this folder in front sees."""
    code = (
        'import json, sys, torch, numpy, triton; print(json.dumps(dict('
        'triton=triton.__version__, torch=torch.__version__, numpy=numpy.__version__, '
        'python=sys.version.split()[0])))'
    )
    environment = os.environ | ({'PYTHONPATH': folder} if folder else {})
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def append(path: Path, row: dict) -> None:
    """Add a row to a results file, with names of columns on top of a new one."""
    new = not path.exists()
    with path.open('a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerow(row)


def try_version(version: str | None, forms: list[str], records: Path, path: Path) -> bool:
    """Try one Triton, append its rows, and say whether one form of the kernels passed whole."""
    with contextlib.nullcontext() if version is None else installed(version) as folder:
        known = versions_here(folder)
        known |= {
            'of_torch': OF_TORCH.get(known['triton'], ''), 'commit': commit(),
            'date': datetime.date.today().isoformat(),
        }
        for form in forms:
            row = known | attempt(folder, form, records)
            append(path, row)
            refused = [row.get(f'sm_{x}_refused', 1) for x in CAPABILITIES]
            good = not row['failed'] and not any(refused)
            print(f'Triton {known["triton"]}, {form}: {"passes" if good else "FAILS"}', flush=True)
            if good:
                return True
    return False


def main() -> int:
    """Try every version that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('versions', nargs='*', default=list(OF_TORCH), metavar='VERSION')
    parser.add_argument('--here', action='store_true', help='the installed Triton only')
    parser.add_argument('--only', choices=FORMS, help='one form of the kernels')
    parser.add_argument('--csv', type=Path, default=RESULTS, help='rows are appended here')
    for name, count in (('form', None), ('cases', 2), ('record', None), ('compile', None)):
        parser.add_argument(f'--{name}', nargs=count, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        take_form(options.form)
    if options.cases:
        return cases(*options.cases)
    if options.record:
        record(options.record)
        return 0
    if options.compile:
        print(json.dumps(compile_all(options.compile)))
        return 0
    with tempfile.TemporaryDirectory(prefix='triton-launches-') as folder:
        records = Path(folder) / 'launches.pickle'
        environment = os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT)}
        subprocess.run(
            [sys.executable, __file__, '--form', 'written', '--record', str(records)],
            env=environment, cwd=ROOT, check=True,
        )
        versions = [None] if options.here else options.versions
        forms = [options.only] if options.only else list(FORMS)
        return not all([try_version(x, forms, records, options.csv) for x in versions])


if __name__ == '__main__':
    sys.exit(main())
