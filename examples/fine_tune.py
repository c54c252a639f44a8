"""Fine-tune a detector on a folder with images and a COCO file, and look at what it finds.

    python examples/fine_tune.py data/parts
    python examples/fine_tune.py data/parts --model vmamba-t --weights vmamba-t-s1l8

Further options are those of `mmhybrid init`. The pictures go to data/parts/mmhybrid/found/.
"""

import sys
from pathlib import Path

import mmhybrid
from mmhybrid.cli import main as command


def run(*arguments) -> None:
    """Run a command of mmhybrid in this process."""
    status = command([str(argument) for argument in arguments])
    if status:
        sys.exit(status)


def fine_tune(data: Path, *options: str, settings: tuple = ()) -> list[Path]:
    """Train, then draw what is found in the first eight pictures.

    Args:
        data: the folder.
        options: for ``mmhybrid init``.
        settings: for the training, such as ``train_cfg.max_epochs=2``.

    Returns:
        The drawn pictures.
    """
    run('init', data, *options)
    (config,) = (data / 'mmhybrid').glob('*.py')
    work = data / 'mmhybrid' / 'work'
    run('train', config, '--work-dir', work, *(['--cfg-options', *settings] if settings else []))

    model = mmhybrid.load(work)  # the best checkpoint of the run
    pictures = sorted(path for path in (data / 'images').iterdir() if path.is_file())[:8]
    drawn = []
    (data / 'mmhybrid' / 'found').mkdir(exist_ok=True)
    for found in model.predict(pictures, score=0.5):
        print(Path(found.picture).name, [found.names[label] for label in found.labels])
        drawn.append(data / 'mmhybrid' / 'found' / f'{Path(found.picture).stem}.png')
        found.plot().save(drawn[-1])
    return drawn


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    fine_tune(Path(sys.argv[1]), *sys.argv[2:])
