#!/usr/bin/env python
"""Adapters against full tuning: the same start, config, epochs and seed on the mini set.

Trains configs/cascade_mambavision_mini_coco.py twice, from the backbone of a detector that was
trained on the mini set before and with fresh necks and heads: once all of it, once with ``--lora``.
Prints box and mask AP of both; exit status 0 if adapters are within two points of full tuning.

Measured on a busy machine, one thread, one seed, 3 epochs from the backbone of a detector after 10
of its 12 epochs on the same images: box / mask AP 0.518 / 0.434 in 155 s of processor time for all
weights, 0.559 / 0.439 in 148 s for rank 8.

    python tools/benchmark/lora.py --start work_dirs/quickstart/epoch_12.pth --epochs 3
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/cascade_mambavision_mini_coco.py'
POINTS = 0.02


def main() -> None:
    """Train both, print the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--start', required=True, help='checkpoint of a detector of the config')
    parser.add_argument('--data-root', help="default: the config's")
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--rank', type=int, default=8)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/lora'))
    args = parser.parse_args()
    found = {}
    for name, options in (('full', []), ('lora', ['--lora', str(args.rank)])):
        folder, begin, started = args.work_dir / name, os.times(), time.perf_counter()
        train(args, folder, options)
        end = os.times()
        spent = sum(end[2:4]) - sum(begin[2:4])  # of children, in user and system
        found[name] = box, mask = scores(folder)
        print(f'{name:5} box AP {box:.3f}, mask AP {mask:.3f}; {args.epochs} epochs in '
              f'{spent:.0f} s of processor time, {time.perf_counter() - started:.0f} s in all',
              flush=True)
    lost = max(full - lora for full, lora in zip(found['full'], found['lora'], strict=True))
    print(f'rank {args.rank} loses {100 * lost:.1f} points where it is worse (below 0: gains)')
    sys.exit(lost > POINTS)


def train(args: argparse.Namespace, folder: Path, options: list[str]) -> None:
    """Train once, in a process of its own."""
    root = ['--data-root', args.data_root] if args.data_root else []
    epochs = args.epochs
    subprocess.run(
        [sys.executable, '-m', 'mmhybrid', 'train', str(CONFIG), '--work-dir', str(folder),
         '--pretrained', args.start, *root, *options, '--cfg-options', 'randomness.seed=0',
         f'train_cfg.max_epochs={epochs}', f'train_cfg.val_interval={epochs}',
         f'param_scheduler.1.T_max={epochs}', f'param_scheduler.1.end={epochs}'],
        check=True, env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def scores(folder: Path) -> tuple[float, float]:
    """Box and mask AP of the last validation."""
    newest = max(folder.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text(encoding='utf-8').splitlines()]
    last = next(row for row in reversed(rows) if 'coco/bbox_mAP' in row)
    return last['coco/bbox_mAP'], last['coco/segm_mAP']


if __name__ == '__main__':
    main()
