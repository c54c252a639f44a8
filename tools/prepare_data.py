#!/usr/bin/env python
"""Generate the mini data sets, or check the real ones and say what to fetch.

Examples:
    python tools/prepare_data.py mini-coco --root data/
    python tools/prepare_data.py mini-ade20k --root data/ --train 200 --val 60 --seed 1
    python tools/prepare_data.py coco --root data/
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmhybrid.datasets.mini_ade20k import write_mini_ade20k  # noqa: E402
from mmhybrid.datasets.mini_coco import write_mini_coco  # noqa: E402
from mmhybrid.datasets.mini_imagenet import (  # noqa: E402
    verify_mini_imagenet,
    write_mini_imagenet,
)
from mmhybrid.datasets.verify import verify_ade20k, verify_coco  # noqa: E402

# Below --root; for the real sets these are the folders that our configs name.
FOLDERS = {
    'coco': 'coco',
    'ade20k': 'ade/ADEChallengeData2016',
    'mini-coco': 'mini_coco',
    'mini-ade20k': 'mini_ade20k/ADEChallengeData2016',
    'mini-imagenet': 'mini_imagenet',
}
CONFIGS = {
    'mini-coco': 'configs/cascade_mambavision_mini_coco.py',
    'mini-ade20k': 'configs/upernet_mambavision_mini_ade20k.py',
    'mini-imagenet': 'configs/classification/localvmamba_mini_imagenet.py',
}
WRITE = {'mini-coco': write_mini_coco, 'mini-ade20k': write_mini_ade20k,
         'mini-imagenet': write_mini_imagenet}
# Whether a set is whole, without opening images: this takes no time.
VERIFY = {'mini-coco': partial(verify_coco, samples=0),
          'mini-ade20k': partial(verify_ade20k, samples=0),
          'mini-imagenet': verify_mini_imagenet}
OPTIONS = ('train', 'val', 'seed')


class ProgressLine:
    """Done, total and the time left: rewritten in place on a terminal, every 10 % elsewhere."""

    def __init__(self, what: str, unit: str):
        self.what, self.unit = what, unit
        self.start = self.shown = time.monotonic()
        self.tenth = -1

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if terminal and now - self.shown < 0.2 and done < total:
            return
        if not terminal and done * 10 // total == self.tenth:
            return
        self.shown, self.tenth = now, done * 10 // total
        left = (now - self.start) / done * (total - done)
        line = f'{self.what}: {done}/{total} {self.unit}, {left:.0f} s left'
        end = '\n' if not terminal or done == total else ''
        print(f'\r{line:<70}' if terminal else line, end=end, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=sorted(FOLDERS))
    parser.add_argument('--root', default='data/', help='the set goes or is below it '
                        '(default: data/)')
    parser.add_argument('--train', type=int, help='mini sets: number of training images')
    parser.add_argument('--val', type=int, help='mini sets: number of validation images')
    parser.add_argument('--seed', type=int, help='mini sets: another seed gives other images')
    parser.add_argument('--force', action='store_true',
                        help='mini sets: replace a generated set that is there')
    args = parser.parse_args(argv)
    if args.dataset not in CONFIGS:
        given = [f'--{name}' for name in OPTIONS if getattr(args, name) is not None]
        if given or args.force:
            parser.error(f"{' '.join(given) or '--force'} is for the mini sets; {args.dataset} is "
                         "only checked, never written")
    return args


def generate(args: argparse.Namespace, folder: Path) -> int:
    """Write a mini set; returns the exit status."""
    options = {name: getattr(args, name) for name in OPTIONS
               if getattr(args, name) is not None}
    start = time.monotonic()
    try:
        written = WRITE[args.dataset](
            folder, **options, force=args.force, progress=ProgressLine(args.dataset, 'images'))
    except (ValueError, FileExistsError, ModuleNotFoundError, FileNotFoundError) as error:
        print(f'prepare_data: {error}', file=sys.stderr)
        return 1
    if written:
        print(f'{args.dataset} written to {folder}/ in {time.monotonic() - start:.0f} s.')
    else:  # whole, too?
        report = VERIFY[args.dataset](folder)
        if not report.ok:
            print('prepare_data: ' + ' '.join(report.problems), file=sys.stderr)
            return 1
        print(f'{args.dataset} is already in {folder}/, nothing to do.')
    print(f'Use it with: {CONFIGS[args.dataset]} --cfg-options data_root={folder}/')
    return 0


def check(args: argparse.Namespace, folder: Path) -> int:
    """Check a real set; returns the exit status."""
    verify = verify_coco if args.dataset == 'coco' else verify_ade20k
    report = verify(folder, progress=ProgressLine(f'checking {args.dataset}', 'steps'))
    for fact in report.facts:
        print(f'ok       {fact}')
    for problem in report.problems:
        print(f'PROBLEM  {problem}')
    print(f'{folder}: ' + ('ready.' if report.ok else f'{len(report.problems)} problem(s).'))
    return 0 if report.ok else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    folder = Path(args.root) / FOLDERS[args.dataset]
    return generate(args, folder) if args.dataset in CONFIGS else check(args, folder)


if __name__ == '__main__':
    sys.exit(main())
