"""Generate the mini data sets, or check the real ones and say what to fetch."""

import sys
import time
from functools import partial
from pathlib import Path

from mmhybrid.errors import UserError

EXAMPLE = """mmhybrid data mini-coco --root data/
mmhybrid data mini-ade20k --root data/ --train 200 --val 60 --seed 1
mmhybrid data coco --root data/"""
LIGHT = True

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


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('dataset', choices=sorted(FOLDERS))
    parser.add_argument('--root', default='data/', help='the set goes or is below it '
                        '(default: data/)')
    parser.add_argument('--train', type=int, help='mini sets: number of training images')
    parser.add_argument('--val', type=int, help='mini sets: number of validation images')
    parser.add_argument('--seed', type=int, help='mini sets: another seed gives other images')
    parser.add_argument('--force', action='store_true',
                        help='mini sets: replace a generated set that is there')
    parser.set_defaults(wrong_usage=parser.error)


def run(args):
    """Write a mini set or check a real one; returns the exit status."""
    folder = Path(args.root) / FOLDERS[args.dataset]
    if args.dataset in CONFIGS:
        return generate(args, folder)
    given = [f'--{name}' for name in OPTIONS if getattr(args, name) is not None]
    if given or args.force:
        args.wrong_usage(f"{' '.join(given) or '--force'} is for the mini sets; {args.dataset} is "
                         'only checked, never written')
    return check(args, folder)


def generate(args, folder):
    """Write a mini set, unless it is there and whole."""
    write, verify = _mini_set(args.dataset)
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    start = time.monotonic()
    try:
        progress = ProgressLine(args.dataset, 'images')
        written = write(folder, **options, force=args.force, progress=progress)
    except (ValueError, FileExistsError, ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(error) from error
    if written:
        print(f'{args.dataset} written to {folder}/ in {time.monotonic() - start:.0f} s.')
    else:  # whole, too?
        report = verify(folder)
        if not report.ok:
            raise UserError(' '.join(report.problems))
        print(f'{args.dataset} is already in {folder}/, nothing to do.')
    print(f'Use it with: {CONFIGS[args.dataset]} --cfg-options data_root={folder}/')


def _mini_set(name):
    """How to write a set, and how to tell without opening images, in no time, if it is whole."""
    if name == 'mini-coco':
        from mmhybrid.datasets.mini_coco import write_mini_coco
        from mmhybrid.datasets.verify import verify_coco

        return write_mini_coco, partial(verify_coco, samples=0)
    if name == 'mini-ade20k':
        from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
        from mmhybrid.datasets.verify import verify_ade20k

        return write_mini_ade20k, partial(verify_ade20k, samples=0)
    from mmhybrid.datasets.mini_imagenet import verify_mini_imagenet, write_mini_imagenet

    return write_mini_imagenet, verify_mini_imagenet


def check(args, folder):
    """Check a real set; returns the exit status."""
    from mmhybrid.datasets.verify import verify_ade20k, verify_coco

    verify = verify_coco if args.dataset == 'coco' else verify_ade20k
    report = verify(folder, progress=ProgressLine(f'checking {args.dataset}', 'steps'))
    for fact in report.facts:
        print(f'ok       {fact}')
    for problem in report.problems:
        print(f'PROBLEM  {problem}')
    print(f'{folder}: ' + ('ready.' if report.ok else f'{len(report.problems)} problem(s).'))
    return 0 if report.ok else 1
