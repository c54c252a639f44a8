#!/usr/bin/env python
"""Walk from a YOLO folder to pictures of predictions, and compare with a written recipe.

Makes a YOLO folder of 40 images from the mini set, then runs three commands on it (``mmhybrid
init``, ``train``, ``predict``), and trains configs/cascade_mambavision_mini_coco.py on the same 40
images for the same time. Both are scored on the 64 held-out images of the mini set.

Measured by hand on a busy machine, one thread, one seed, each command by itself: box AP 0.253 after
124 s of processor time for the config of init (which trains on 32 of the 40 images), and 0.255
after 158 s for 40 epochs of the recipe.

    python tools/benchmark/own_data.py --root work_dirs/walk
"""
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from mmhybrid.datasets.mini_coco import KINDS, write_mini_coco  # noqa: E402

IMAGES = 40
TRIAL = 4  # epochs that tell how long one takes
REFERENCE = 'configs/cascade_mambavision_mini_coco.py'


def main() -> None:
    """Run the walk and print the two scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, default=Path('work_dirs/walk'), help='new folder')
    root = parser.parse_args().root.resolve()
    if root.exists() and any(root.iterdir()):
        sys.exit(f'{root} is not empty; give a new folder with --root')
    write_mini_coco(root / 'mini_coco', train=IMAGES)
    shapes = write_yolo(root / 'mini_coco', root / 'shapes')

    config = shapes / 'mmhybrid/shapes.py'
    command('init', shapes)
    spent = command('train', config, '--work-dir', root / 'own')
    command('predict', root / 'mini_coco/val2017', '--weights', root / 'own', '--out',
            root / 'predictions')
    own = score(config, newest(root / 'own'), root, 'own', options=held_out(root))

    each = trial(root)
    epochs = max(1, round(spent / each))
    reference(root, 'reference', epochs)
    other = score(REFERENCE, newest(root / 'reference'), root, 'reference', root / 'mini_coco')
    print(f'box AP on {IMAGES} images: init {own:.3f} in {spent:.0f} s, {REFERENCE} {other:.3f} in '
          f'{epochs} epochs of {each:.1f} s')
    sys.exit(own < other - 0.03)


def write_yolo(source: Path, target: Path) -> Path:
    """Write the training images of a mini set and their boxes as YOLO's files; crowds are none."""
    names = [kind.name for kind in KINDS]
    content = json.loads((source / 'annotations/instances_train2017.json').read_text())
    labels = {entry['id']: entry['name'] for entry in content['categories']}
    for folder in ('images', 'labels'):
        (target / folder).mkdir(parents=True)
    for image in content['images']:
        rows = []
        for entry in content['annotations']:
            if entry['image_id'] == image['id'] and not entry['iscrowd']:
                x, y, w, h = entry['bbox']
                rows.append(f'{names.index(labels[entry["category_id"]])} '
                            f'{(x + w / 2) / image["width"]} {(y + h / 2) / image["height"]} '
                            f'{w / image["width"]} {h / image["height"]}\n')
        name = image['file_name']
        (target / 'images' / name).write_bytes((source / 'train2017' / name).read_bytes())
        (target / f'labels/{Path(name).stem}.txt').write_text(''.join(rows))
    (target / 'data.yaml').write_text(f'train: images\nnames: {names}\n')
    return target


def command(*arguments) -> float:
    """Run a subcommand of mmhybrid; returns its seconds."""
    line = [sys.executable, '-m', 'mmhybrid', *map(str, arguments)]
    print('$ mmhybrid ' + ' '.join(line[3:]), flush=True)
    start = time.monotonic()
    subprocess.run(line, check=True, cwd=ROOT)
    return time.monotonic() - start


def trial(root: Path) -> float:
    """Seconds of an epoch of the reference, without those of starting it."""
    times = [reference(root, f'trial_{epochs}', epochs) for epochs in (1, 1 + TRIAL)]
    return (times[1] - times[0]) / TRIAL


def reference(root: Path, name: str, epochs: int) -> float:
    """Train the reference; returns seconds."""
    return command(
        'train', REFERENCE, '--data-root', root / 'mini_coco', '--work-dir', root / name,
        '--cfg-options', f'train_cfg.max_epochs={epochs}', f'train_cfg.val_interval={epochs}',
        f'default_hooks.checkpoint.interval={epochs}', f'param_scheduler.1.end={epochs}',
        f'param_scheduler.1.T_max={epochs}')


def held_out(root: Path) -> list[str]:
    """Options that score a config of ours on the held-out images of the mini set."""
    data = root / 'mini_coco'
    content = json.loads((data / 'annotations/instances_val2017.json').read_text())
    # Classes are numbered by their order in a file, and ours has those of the folder alone.
    known = {entry['name']: entry for entry in content['categories']}
    content['categories'] = [known[kind.name] for kind in KINDS]
    file = root / 'held_out.json'
    file.write_text(json.dumps(content))
    return [f'test_dataloader.dataset.data_root={data}', f'test_dataloader.dataset.ann_file={file}',
            'test_dataloader.dataset.data_prefix.img=val2017', f'test_evaluator.ann_file={file}']


def newest(folder: Path) -> Path:
    """The best checkpoint of a run, or else its last."""
    best = sorted(folder.glob('best_*.pth'))
    return best[-1] if best else max(folder.glob('epoch_*.pth'), key=lambda p: p.stat().st_mtime)


def score(config, checkpoint: Path, root: Path, name: str, data: Path | None = None,
          options: Sequence[str] = ()) -> float:
    """Box AP."""
    where = root / f'{name}_test'
    command('test', config, checkpoint, '--work-dir', where,
            *(['--data-root', data] if data else []),
            *(['--cfg-options', *options] if options else []))
    log = max(where.rglob('*.log'), key=lambda path: path.stat().st_mtime).read_text()
    return float(re.findall(r'coco/bbox_mAP: (-?[\d.]+)', log)[-1])


if __name__ == '__main__':
    main()
