"""Photographs that ship inside the scikit-image wheel, split between training and validation.

Only files that are part of the wheel are named here. Several images of `skimage.data` are
downloaded on first use; a generator built on those would fail offline.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

# No scene is in both lists (the other half of the stereo pair, motorcycle_right.png, in neither).
# coins.png and the eye and sky images stay out: they are full of unlabelled discs.
PHOTOGRAPHS = {
    'train': ('astronaut.png', 'brick.png', 'coffee.png', 'grass.png', 'ihc.png',
              'motorcycle_left.png'),
    'val': ('camera.png', 'chelsea.png', 'gravel.png', 'moon.png', 'rocket.jpg'),
}


def photograph_dir() -> Path:
    """Return the folder of the installed scikit-image wheel that holds the photographs.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec('skimage')
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            'The mini data sets are drawn on photographs from the scikit-image wheel, which is not '
            'installed. Install it with: pip install scikit-image')
    return Path(next(iter(spec.submodule_search_locations))) / 'data'


def load_photographs(split: str) -> dict[str, np.ndarray]:
    """Load the photographs of one split.

    Args:
        split: 'train' or 'val'.

    Returns:
        Photographs by file name, each (H, W, 3) uint8 RGB (grey ones repeated three times).

    Raises:
        ValueError: Another split name.
        FileNotFoundError: The installed scikit-image does not bring one of the files.
    """
    if split not in PHOTOGRAPHS:
        raise ValueError(f"split is {split!r}; expected 'train' or 'val'.")
    folder = photograph_dir()
    photographs = {}
    for name in PHOTOGRAPHS[split]:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f'{path} is missing. The scikit-image wheels from 0.22 on contain it; reinstall '
                'with: pip install --force-reinstall --no-deps scikit-image')
        with Image.open(path) as image:
            photographs[name] = np.asarray(image.convert('RGB'))
    return photographs
