"""Charts of what a model gets wrong: costs of kinds of mistakes, and classes taken for others."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .pictures import class_colors

__all__ = ['draw_bars', 'draw_confusion']

_DPI = 110
_CELL = 0.42  # inches
_MOST_NUMBERS = 24  # classes up to which each cell says its number


def draw_bars(values: Mapping[str, float], notes: Mapping[str, str], title: str = '',
              label: str = '') -> Image.Image:
    """Draw horizontal bars, one for each name.

    Args:
        values: by name, from top to bottom.
        notes: what stands behind the bar of a name.
        title: a line on top.
        label: what the lengths mean.
    """
    figure = _figure(7.2, 1.3 + 0.36 * len(values))
    axes = figure.add_subplot()
    places = np.arange(len(values))
    axes.barh(places, list(values.values()), height=0.68, color=[
        np.array(color) / 255 for color in class_colors(len(values))])
    for place, (name, value) in enumerate(values.items()):
        axes.annotate(f'{value:.1f}{notes.get(name, "")}', (max(value, 0), place), (5, 0),
                      textcoords='offset points', va='center', fontsize=9)
    axes.set_yticks(places, list(values), fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(min(0, *values.values()), 1.45 * max(1, *values.values()))
    axes.set_xlabel(label, fontsize=9)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_title(title, fontsize=10, loc='left')
    return _picture(figure)


def draw_confusion(shares: np.ndarray, names: Sequence[str], title: str = '') -> Image.Image:
    """Draw which classes are taken for which.

    Args:
        shares: (N, N), of what is there (rows) how much was found as what (columns), in percent.
        names: of the classes.
        title: a line on top.
    """
    count = len(names)
    side = _CELL * count
    figure = _figure(3.1 + side, 2.6 + side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=100)
    if count <= _MOST_NUMBERS:
        for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
            axes.text(column, row, f'{shares[row, column]:.0f}', ha='center', va='center',
                      fontsize=8, color='white' if shares[row, column] > 50 else '#222222')
    axes.set_xticks(range(count), names, rotation=90, fontsize=8)
    axes.set_yticks(range(count), names, fontsize=8)
    axes.set_xlabel('found', fontsize=9)
    axes.set_ylabel('is there', fontsize=9)
    axes.tick_params(length=0)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label='% of the pixels of a row')
    return _picture(figure)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout='constrained')


def _picture(figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
