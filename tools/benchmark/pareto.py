"""Images per second against published accuracy (MambaVision's Figure 1, VMamba's Table 1).

    python tools/benchmark/pareto.py --csv pareto.csv --plot pareto.png
    python tools/benchmark/pareto.py --only 'MambaVision-T|VMamba-T' --batch 1

Networks and their published figures are the rows of configs/papers.yml that have a model: ours by
class and variant, others by their name in timm. Accuracies stay as published; images per second
are measured here, with random weights, networks in turns (A B A B). The published ones are of an
A100 with batches of 128 under autocast; on a GPU that is the default here too.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from timing import (
    CLOCKS,
    ENVIRONMENT,
    PERCENTILES,
    Failures,
    append_rows,
    default_clock,
    environment,
    in_sequence,
    percentiles,
    seconds_per_call,
    take_turns,
)

from mmhybrid.analysis.models.source import build_model, find_model
from mmhybrid.papers import find_claim, read_papers

COLUMNS = (*ENVIRONMENT, 'model', 'size', 'B', 'dtype', 'published_top1', 'published_images_per_s',
           *PERCENTILES, 'images_per_s')
CLAIM = 'mambavision/figure-1'
TIMM = 'timm:'


def points(only: str) -> list[dict]:
    """Name, model, top-1 and images per second of the rows whose name matches."""
    rows = [row for row in find_claim(read_papers(), CLAIM).rows if row.model]
    chosen = [row for row in rows if re.search(only, row.name)]
    if not chosen:
        raise SystemExit(f'--only {only} matches none of {", ".join(row.name for row in rows)}.')
    found = []
    for row in chosen:
        top1, speed = (part.strip() for part in row.published.split(','))
        found.append(dict(name=row.name, spec=row.model, top1=top1, speed=speed))
    return found


def build(spec: str) -> torch.nn.Module:
    """A classifier in eval mode, the same weights every time."""
    torch.manual_seed(0)
    if spec.startswith(TIMM):
        import timm

        return timm.create_model(spec.removeprefix(TIMM)).eval()
    return build_model(find_model(spec), seed=0).eval()


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Published points, and measured ones beside them."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout='constrained')
    families = list(dict.fromkeys(row['model'].partition('-')[0] for row in rows))
    for axis, column, name in zip(axes, ('published_images_per_s', 'images_per_s'),
                                  ('published', 'measured here'), strict=True):
        for i, family in enumerate(families):
            own = [row for row in rows if row['model'].partition('-')[0] == family
                   and row.get(column)]
            axis.plot([float(row[column]) for row in own],
                      [float(row['published_top1']) for row in own], marker='o', color=f'C{i}',
                      label=family)
            for row in own:
                axis.annotate(row['model'], (float(row[column]), float(row['published_top1'])),
                              fontsize=7, xytext=(4, 3), textcoords='offset points')
        axis.set(xscale='log', xlabel='images per second', title=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('ImageNet top-1, as published')
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', metavar='REGEX', help='names that match')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, help='images (default: 128 on a GPU, 1 on a CPU)')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'),
                        help='of autocast (default: float16 on a GPU, float32 on a CPU)')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=120, metavar='S',
                        help='no further turn after these (default: 120)')
    parser.add_argument('--threads', type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument('--device', choices=('cpu', 'cuda'),
                        default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--clock', choices=CLOCKS, help='default: cuda on a GPU, else wall')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    parser.add_argument('--plot', metavar='PATH', help='write a picture')
    args = parser.parse_args(arguments)
    gpu = args.device == 'cuda'
    if gpu and not torch.cuda.is_available():
        parser.error('PyTorch sees no GPU; use --device cpu.')
    args.batch = args.batch or (128 if gpu else 1)
    args.dtype = args.dtype or ('float16' if gpu else 'float32')
    args.clock = args.clock or default_clock(args.device)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record; return 1 when something failed."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    record = environment(args.device, args.clock)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    autocast = torch.autocast(args.device, getattr(torch, args.dtype),
                              enabled=args.dtype != 'float32')
    failures, works, known = Failures(), {}, {}
    with torch.no_grad(), autocast:
        for point in points(args.only):
            with failures.noted(point['name']):
                network = build(point['spec']).to(args.device)
                work = in_sequence([lambda network=network: network(x)])
                seconds_per_call(work, args.clock)  # compiles kernels
                works[point['name']], known[point['name']] = work, point
        times = take_turns(works, args.turns, args.clock, args.seconds)
    rows = []
    for name, seconds in times.items():
        columns = percentiles(seconds)
        speed = f"{args.batch / float(columns['p50_ms']) * 1e3:.4g}"
        rows.append(record | columns | dict(
            model=name, size=args.size, B=args.batch, dtype=args.dtype, images_per_s=speed,
            published_top1=known[name]['top1'], published_images_per_s=known[name]['speed']))
        print(f"{name}: top-1 {known[name]['top1']} (published), {speed} images/s "
              f"({known[name]['speed']} published)", flush=True)
    if args.csv:
        append_rows(args.csv, COLUMNS, rows)
    if args.plot and rows:
        plot(rows, Path(args.plot), f"{record['device']}, torch {record['torch']}, batch "
             f"{args.batch}, {args.dtype}, {record['commit']}")
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
