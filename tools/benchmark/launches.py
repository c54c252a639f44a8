"""Count the launches and bytes of backbones' training steps as CUDA would run them; no GPU needed.

    python tools/benchmark/launches.py
    python tools/benchmark/launches.py --case vmamba_t_seg --by module
    python tools/benchmark/launches.py --against CHECKOUT_OF_ANOTHER_STATE
    python tools/benchmark/launches.py --write

A step is the forward pass under autocast, the mean of all maps as the loss, and the backward pass;
the optimizer is left out, and so is stochastic depth. How it is counted stands in
mmhybrid/analysis/launches.py. At commit 03c1dbf a profiler on an H200 counted 1310 launches for
mambavision_t_det, in bfloat16, and 1700 for vmamba_t_seg; this counts 1124 and 1498 of them, 14 and
12 % fewer. Casts, norms, attention and activations come out nearly as profiled (339 casts of 337,
417 of 403). Missing are second kernels of matrix products that a library cuts into parts, and
copies within libraries.

--write puts the numbers of this checkout into results/launches.csv, whose "first" columns belong to
commit 03c1dbf and stay; tests/test_tools/test_benchmark_launches.py fails when a number grows
beyond the file's. The exit code is 1 when a target is missed.
"""

import argparse
import collections
import csv
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).parent / 'results' / 'launches.csv'


class Case(NamedTuple):
    """A backbone's training step.

    Attributes:
        model: class in the registry.
        arguments: of the class, beside ``drop_path_rate=0``.
        size: of the images.
        dtype: of autocast.
        target: most launches in percent of those of commit 03c1dbf, None where none is set.
    """

    model: str
    arguments: dict
    size: tuple[int, ...]
    dtype: str
    target: int | None = None


_DET_WINDOWS = {'window_size': (8, 8, 112, 56)}
CASES = {
    'mambavision_t_det': Case('MambaVision', _DET_WINDOWS, (2, 3, 832, 1344), 'float16', 57),
    'mambavision_t_tight_det': Case(
        'MambaVision', _DET_WINDOWS | {'windows': 'tight'}, (2, 3, 832, 1344), 'float16'),
    'mambavision_t_seg': Case(
        'MambaVision', {'window_size': (8, 8, 64, 32)}, (2, 3, 512, 512), 'float16'),
    'mambavision_t_cls': Case('MambaVision', {}, (64, 3, 224, 224), 'bfloat16'),
    'vmamba_t_seg': Case('VMamba', {}, (2, 3, 512, 512), 'bfloat16', 50),
    'vmamba_t_det': Case('VMamba', {}, (2, 3, 832, 1344), 'bfloat16'),
    'vim_ti_seg': Case('Vim', {'img_size': 512}, (2, 3, 512, 512), 'bfloat16', 50),
    'localvim_t_seg': Case('LocalVim', {'img_size': 512}, (2, 3, 512, 512), 'bfloat16'),
    'localvmamba_t_seg': Case('LocalVMamba', {}, (2, 3, 512, 512), 'bfloat16', 50),
}


def counted(case: Case, shallow: bool = False) -> list:
    """The launches of a case, with the mmhybrid that Python finds.

    Args:
        case: of :data:`CASES`.
        shallow: with few blocks, which launch the same in a fraction of the time.
    """
    from mmhybrid.registry import MODELS

    cls = MODELS.get(case.model)
    arguments = case.arguments | (_few_blocks(cls) if shallow else {})
    if 'windows' not in inspect.signature(cls).parameters:
        arguments.pop('windows', None)  # up to commit 03c1dbf all windows were as published

    model = MODELS.build({'type': case.model, 'drop_path_rate': 0.0} | arguments)
    return _analysis().launches.count_launches(model, case.size, getattr(torch, case.dtype))


def _few_blocks(cls) -> dict:
    """Arguments that take away blocks and leave one of each kind."""
    arch = dict(sys.modules[cls.__module__].ARCHITECTURES['tiny'])
    arguments = {'arch': arch}
    if 'depths' in arch:
        # a mixer and an attention in each of MambaVision's last stages
        arch['depths'] = (1, 1, 2, 2) if 'window_size' in arch else (1, 1, 1, 1)
        blocks = sum(arch['depths'])
    else:
        arch['depth'] = blocks = 2
        arguments['out_indices'] = (1,)
    if cls.__name__.startswith('Local'):
        lists = [('h', 'h_flip', 'v', 'w2'), ('v_flip', 'w2_flip', 'w7', 'w7_flip')]
        arguments['directions'] = (lists * blocks)[:blocks]
    return arguments


def _analysis():
    """This checkout's counter, which may look at the mmhybrid of another one."""
    import importlib.util

    if 'counting' not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            'counting', ROOT / 'mmhybrid' / 'analysis' / '__init__.py')
        sys.modules['counting'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules['counting'])
        importlib.import_module('counting.launches')
    return sys.modules['counting']


def counted_elsewhere(checkout: Path, names: list[str]) -> dict[str, list]:
    """The same, of the package in another folder, in a process of its own."""
    command = [sys.executable, __file__, '--json', '--case', *names]
    done = subprocess.run(command, env=os.environ | {'PYTHONPATH': str(checkout)}, cwd=checkout,
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def sums(launches: list, by: str) -> dict[str, tuple[int, int]]:
    """Launches and bytes by what they are for, most first."""
    found = collections.defaultdict(lambda: [0, 0])
    for one in launches:
        key = {'kind': one['kind'], 'operator': f"{one['operator'].removeprefix('aten::')}",
               'module': '.'.join(one['module'].split('.')[:4])}[by]
        found[key][0] += one['launches']
        found[key][1] += one['bytes']
    return {key: tuple(value) for key, value in sorted(found.items(), key=lambda kv: -kv[1][0])}


def total(launches: list) -> tuple[int, int]:
    """All launches, and all bytes in MB."""
    return (sum(one['launches'] for one in launches),
            round(sum(one['bytes'] for one in launches) / 1e6))


def show(name: str, now: list, then: list | None, by: str) -> None:
    """Print one case."""
    print(f'\n{name}: {total(now)[0]} launches, {total(now)[1]} MB'
          + (f'; against {total(then)[0]}, {total(then)[1]} MB' if then else ''))
    mine, other = sums(now, by), sums(then, by) if then else {}
    width = max(map(len, {**mine, **other}))
    for key in {**mine, **other}:
        (launches, size), (before, size_before) = mine.get(key, (0, 0)), other.get(key, (0, 0))
        line = f'  {key:{width}}  {launches:5} {size / 1e6:9.1f} MB'
        print(line + (f'   {before:5} {size_before / 1e6:9.1f} MB' if then else ''))


def read_table(path: Path = TABLE) -> dict[str, dict]:
    """The committed numbers by case."""
    with path.open(newline='') as file:
        return {row['case']: row for row in csv.DictReader(file)}


COLUMNS = ('case', 'first_launches', 'first_MB', 'launches', 'MB', 'percent', 'target_percent',
           'shallow_launches', 'shallow_MB')


def rows(found: dict[str, list], first: dict[str, list] | None) -> dict[str, dict]:
    """The table with new numbers in it; those of the first commit stay unless given."""
    table = read_table() if TABLE.exists() else {}
    for name, launches in found.items():
        row = table.setdefault(name, dict.fromkeys(COLUMNS, '') | {'case': name})
        if first:
            row['first_launches'], row['first_MB'] = total(first[name])
        row['launches'], row['MB'] = total(launches)
        row['target_percent'] = CASES[name].target or ''
        if row['first_launches']:
            row['percent'] = f"{100 * row['launches'] / int(row['first_launches']):.1f}"
    return {name: table[name] for name in CASES if name in table}


def write(table: dict[str, dict]) -> None:
    """Rewrite the committed table."""
    with TABLE.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(table.values())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--case', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--against', type=Path, metavar='CHECKOUT',
                        help='folder with another mmhybrid, counted the same way')
    parser.add_argument('--by', choices=('kind', 'operator', 'module'), default='kind')
    parser.add_argument('--write', action='store_true',
                        help='rewrite results/launches.csv; with --against, also its first column')
    parser.add_argument('--json', action='store_true', help='print everything as one line of JSON')
    args = parser.parse_args(arguments)
    if args.against and not (args.against / 'mmhybrid').is_dir():
        parser.error(f'--against expects a folder with mmhybrid in it, got {args.against}.')
    return args


def main(arguments: list[str] | None = None) -> int:
    """Count, print, and compare with the targets."""
    args = parse(arguments)
    found = {name: [vars(one) for one in counted(CASES[name])] for name in args.case}
    if args.json:
        print(json.dumps(found))
        return 0
    other = counted_elsewhere(args.against.resolve(), args.case) if args.against else None
    for name, launches in found.items():
        show(name, launches, other and other[name], args.by)
    table, missed = rows(found, other if args.write else None), 0
    print(f'\nlaunches against commit 03c1dbf ({TABLE.name}):')
    for name in args.case:
        row = table[name]
        target = CASES[name].target
        late = bool(target and row['percent'] and float(row['percent']) > target)
        missed += late
        print(f"  {name:24} {row['launches']:5} of {row['first_launches'] or '?':>5}"
              f"  {row['percent'] or '?':>5} %" + (f'  target {target} %' if target else '')
              + ('  MISSED' if late else ''))
    if args.write:
        for name in args.case:
            launches = [vars(one) for one in counted(CASES[name], shallow=True)]
            table[name]['shallow_launches'], table[name]['shallow_MB'] = total(launches)
        write(table)
    return int(missed > 0)


if __name__ == '__main__':
    sys.exit(main())
