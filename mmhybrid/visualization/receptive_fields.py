"""A picture of effective receptive fields side by side."""
from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
from PIL import Image

__all__ = ['draw_receptive_fields']

_DPI = 110
_SIDE = 2.6  # inches per panel
_COLUMNS = 5
_LETTERS = 36  # of a title over a panel
_DARKEST = 1e-4  # of the largest value, and everything below


def draw_receptive_fields(fields: Mapping[str, np.ndarray], title: str = '') -> Image.Image:
    """Draw one panel for each network, brightness on a logarithmic scale.

    Args:
        fields: per title (H, W), no less than 0, the largest value 1.
        title: a line on top.

    Returns:
        The picture; up to five panels in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(fields), _COLUMNS)
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(0.9 + _SIDE * columns, 0.6 + (_SIDE + 0.3) * rows), dpi=_DPI,
                    layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    shown = None
    for axis, (name, field) in zip(axes, fields.items(), strict=False):
        shown = axis.imshow(np.log10(np.maximum(field, _DARKEST)), cmap='inferno', vmax=0,
                            vmin=np.log10(_DARKEST))
        axis.set_title(textwrap.fill(name, _LETTERS), fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    if title:
        figure.suptitle(textwrap.fill(title, columns * _LETTERS), fontsize=9)
    figure.colorbar(shown, ax=list(axes), shrink=0.8, label='log10 of the gradient, 0 the largest')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
