"""Hold the launch plans of the Triton scan against plans that a GPU measured, and fit their model.

    python tools/benchmark/plans.py
    python tools/benchmark/plans.py --fit --csv results/scan_plans.csv
    python tools/benchmark/plans.py --expect

Per shape: the time of the plan that the measured figures choose over that of the best measured one,
for a forward pass without gradients and for a training step (forward and backward pass share the
chunks; the best may take its programs from two rows). --fit prints the figures of
`mmhybrid/ops/selective_scan/plan.py` as the rows give them, and what each shape would get if it had
not been measured; it needs SciPy. --expect prints the plans of the present kernels, with the times
that their derived figures give: expectations for a GPU to refute. Needs no GPU.
"""

import argparse
import collections
import csv
import re
from pathlib import Path
from typing import NamedTuple

from mmhybrid.ops.selective_scan import plan as plans

SWEEP = Path(__file__).parent / 'results' / 'scan_plans.csv'
PROCESSORS = {'NVIDIA H200': 132, 'NVIDIA H100 80GB HBM3': 132}


class Row(NamedTuple):
    """One measured plan; block is 0 for forms that the kernels no longer have."""

    shape: str
    sizes: tuple[int, int, int, int, int]  # B, G, H, L, N
    processors: int
    block: int
    unroll: int
    chunk: int
    forward: float  # microseconds
    backward: float


def read_rows(path=SWEEP, kernels=plans.KERNELS) -> dict[str, list[Row]]:
    """The rows of the given kernels by shape.

    Raises:
        ValueError: a GPU whose number of multiprocessors is not known here.
    """
    shapes = collections.defaultdict(list)
    with open(path, newline='') as file:
        for line in csv.DictReader(file):
            if line['kernels'] != kernels:
                continue
            if line['device'] not in PROCESSORS:
                raise ValueError(f"{path}: the device '{line['device']}' is none of "
                                 f'{", ".join(PROCESSORS)}; add it, with its multiprocessors, to '
                                 'PROCESSORS in tools/benchmark/plans.py.')
            sizes = tuple(int(line[name]) for name in 'BGHLN')
            named = re.fullmatch(r'b(\d+) u(\d+) c(\d+)', line['plan'])
            block, unroll, chunk = map(int, named.groups()) if named else (0, 0, 0)
            shapes[line['shape']].append(Row(
                line['shape'], sizes, PROCESSORS[line['device']], block, unroll,
                min(chunk, sizes[3]), float(line['forward_us']), float(line['backward_us']),
            ))
    return dict(shapes)


def chooser(passes: tuple[plans.Pass, plans.Pass]):
    """`launch_plan` with other figures."""

    def choose(batch, groups, group_dim, length, state, processors, *, gradients):
        return plans.choose(
            passes, batch * groups, group_dim, length, state, processors, 0, gradients
        )

    return choose


MEASURED = chooser((plans.FORWARD, plans.BACKWARD))


def over_best(rows: list[Row], choose=MEASURED) -> tuple[float, float]:
    """Own plan over the best measured: a forward pass alone, and a training step."""
    length, processors = rows[0].sizes[3], rows[0].processors
    forward = {(row.block, row.unroll, row.chunk): row.forward for row in rows}
    backward = {(row.block, row.unroll, row.chunk): row.backward for row in rows}
    alone = choose(*rows[0].sizes, processors, gradients=False)
    step = choose(*rows[0].sizes, processors, gradients=True)
    best_step = min(row.forward + row.backward for row in rows)
    for chunk in {row.chunk for row in rows if row.block}:
        same = [row for row in rows if row.chunk == chunk]
        both = min(row.forward for row in same) + min(row.backward for row in same)
        best_step = min(best_step, both)

    def at(times, cut, plan):
        return times[cut.block, cut.unroll, min(plan.chunk, length)]

    own_step = at(forward, step.forward, step) + at(backward, step.backward, step)
    own_alone = at(forward, alone.forward, alone)
    return own_alone / min(row.forward for row in rows), own_step / best_step


def samples(which: plans.Pass, rows: list[Row]):
    """What the model says a pass's time depends on, and the time: five arrays over the rows."""
    import numpy as np

    data = []
    for row in rows:
        batch, groups, group_dim, length, state = row.sizes
        whole = row.chunk == length
        if row.block == 0 or (row.chunk > 256 and not whole):
            continue
        wide = which is plans.FORWARD and whole and row.block == 64 and state > 2
        if row.unroll != (8 if wide else 4):
            continue
        resident = plans.resident_warps(which, row.block, state)
        sequences = batch * groups * -(-group_dim // row.block)
        in_turn, load = plans.waves(sequences, length, row.chunk, resident, row.processors)
        n_chunks = 0 if whole else -(-length // row.chunk)
        kind = 4 * whole + 2 * (row.block == 64) + (state == 8)
        measured = row.forward if which is plans.FORWARD else row.backward
        data.append((kind, in_turn, load, n_chunks, measured))
    kind, *rest = np.array(data).T
    return kind.astype(int), *rest


def log_errors(figures, data):
    """Logarithm of model over row; figures: two launches, the carry, eight waits, eight works."""
    import numpy as np

    cut, whole, carry, *costs = figures
    kind, in_turn, load, n_chunks, measured = data
    wait, work = np.reshape(costs, (2, 8))
    fixed = np.where(n_chunks > 0, cut + carry * n_chunks, whole)
    return np.log((fixed + wait[kind] * in_turn + work[kind] * load) / measured)


def error_as_written(which: plans.Pass, rows: list[Row]) -> float:
    """RMS of the logarithm of model over row, with the figures that the planner has."""
    costs = [part[block] for part in (which.cut, which.whole) for block in (32, 64)]
    figures = [*which.launches, which.carry, *(x for cost in costs for x in cost.wait),
               *(x for cost in costs for x in cost.work)]
    return float((log_errors(figures, samples(which, rows)) ** 2).mean() ** 0.5)


def fit(which: plans.Pass, rows: list[Row]) -> tuple[plans.Pass, float]:
    """A pass's figures from rows of N = 1 and 8, and the RMS of the logarithm of model over row."""
    import numpy as np
    from scipy.optimize import least_squares

    data = samples(which, rows)
    start = np.log([6, 3, 0.05] + [0.5] * 8 + [0.05] * 8)
    lower = np.log([2, 1, 0.01] + [1e-5] * 16)
    found = least_squares(lambda logs: log_errors(np.exp(logs), data), start, loss='soft_l1',
                          f_scale=0.1, bounds=(lower, 5))
    cut, whole, carry, *rest = (float(x) for x in np.exp(found.x))
    wait, work = rest[:8], rest[8:]

    def costs(first):
        return {block: plans.Cost((wait[i], wait[i + 1]), (work[i], work[i + 1]))
                for block, i in ((32, first), (64, first + 2))}

    fitted = which._replace(launches=(cut, whole), carry=carry, cut=costs(0), whole=costs(4))
    return fitted, float(np.sqrt((found.fun**2).mean()))


def fit_both(shapes: dict[str, list[Row]]) -> tuple[tuple[plans.Pass, plans.Pass], list[float]]:
    """Both passes' figures and their errors."""
    rows = [row for shape in shapes.values() for row in shape]
    passes, errors = zip(*(fit(p, rows) for p in (plans.FORWARD, plans.BACKWARD)), strict=True)
    return passes, list(errors)


def expectations(shapes: dict[str, list[Row]]) -> list[str]:
    """Markdown rows: best measured microseconds, and plan and microseconds expected now."""
    lines = [
        '| shape | best measured f / f+b us | expected plan f / f+b | expected f / f+b us |',
        '|---|---|---|---|',
    ]
    for shape, rows in shapes.items():
        batch, groups, group_dim, length, state = rows[0].sizes
        best = min(row.forward for row in rows), min(row.forward + row.backward for row in rows)
        named, times = [], []
        for gradients in (False, True):
            plan = plans.launch_plan(*rows[0].sizes, rows[0].processors, gradients=gradients)
            cuts = (plan.forward, plan.backward)[: 1 + gradients]
            times.append(sum(
                plans.pass_time(which, cut.block, plan.chunk, batch * groups, group_dim, length,
                                state, rows[0].processors)
                for which, cut in zip(plans.EXPECTED, cuts, strict=False)
            ))
            blocks = '/'.join(f'b{cut.block}' for cut in cuts)
            named.append(f'{blocks} c{plan.chunk}' if plan.n_chunks > 1 else f'{blocks} whole')
        lines.append(f'| {shape} | {best[0]:.0f} / {best[1]:.0f} | {" / ".join(named)} | '
                     f'{times[0]:.0f} / {times[1]:.0f} |')
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--csv', type=Path, default=SWEEP, help='measured plans')
    parser.add_argument('--kernels', default=plans.KERNELS, metavar='NAME',
                        help='rows of these kernels (default: those that plan.py has figures of)')
    parser.add_argument('--fit', action='store_true', help='fit the figures again')
    parser.add_argument('--expect', action='store_true', help='what the present kernels should do')
    args = parser.parse_args()
    shapes = read_rows(args.csv, args.kernels)
    if args.expect:
        print(*expectations(shapes), sep='\n')
        return
    print(f'{"own over best measured":28s} {"forward":>8s} {"training":>9s}')
    for shape, rows in shapes.items():
        print(f'{shape:28s} {over_best(rows)[0]:8.3f} {over_best(rows)[1]:9.3f}')
    if not args.fit:
        return
    passes, errors = fit_both(shapes)
    for name, which, error in zip(('FORWARD', 'BACKWARD'), passes, errors, strict=True):
        print(f'\n{name}, RMS of log(model / row) {error:.3f}')
        print(f'launches={which.launches} carry={which.carry:.4f}')
        for part in ('cut', 'whole'):
            for block, cost in getattr(which, part).items():
                wait, work = ([round(x, 4) for x in pair] for pair in cost)
                print(f'{part} {block}: wait={wait} work={work}')
    print(f'\n{"if it had not been measured":28s} {"forward":>8s} {"training":>9s}')
    for shape, rows in shapes.items():
        rest = {name: others for name, others in shapes.items() if name != shape}
        alone, step = over_best(rows, chooser(fit_both(rest)[0]))
        print(f'{shape:28s} {alone:8.3f} {step:9.3f}')


if __name__ == '__main__':
    main()
