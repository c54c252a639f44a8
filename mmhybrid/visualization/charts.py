"""A chart of numbers that have names."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from .pictures import class_colors

__all__ = ['draw_bars']

_DPI = 110


def draw_bars(values: Mapping[str, float], notes: Mapping[str, str], title: str = '',
              label: str = '') -> Image.Image:
    """Draw horizontal bars, one for each name.

    Args:
        values: by name, from top to bottom.
        notes: what stands behind the bar of a name.
        title: a line on top.
        label: what the lengths mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.3 + 0.36 * len(values)), dpi=_DPI, layout='constrained')
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
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
