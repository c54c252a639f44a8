"""A picture of how much each block of a network prefers each scan direction."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

__all__ = ['draw_directions']

_DPI = 110
_ROW, _COLUMN = 0.3, 0.8  # inches per block and direction


def draw_directions(shares: Mapping[str, Sequence[float]], directions: Sequence[str],
                    chosen: Mapping[str, Sequence[str]], title: str = '') -> Image.Image:
    """Draw a heat map, blocks from top to bottom and directions from left to right.

    Args:
        shares: per block (in order) one share for each direction; a block's shares sum to 1.
        directions: names of the directions.
        chosen: per block the names that get a frame.
        title: a line on top.

    Returns:
        The picture; its height grows with the number of blocks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    values = 100 * np.asarray(list(shares.values()), dtype=np.float64)
    rows, columns = values.shape
    figure = Figure(figsize=(2.6 + _COLUMN * columns, 1.7 + _ROW * rows), dpi=_DPI,
                    layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap='Blues', aspect='auto', vmin=values.min(),
                        vmax=max(values.max(), values.min() + 1e-9))
    # Dark cells are those in the upper half of the colour bar; there the text is white.
    middle = (values.min() + values.max()) / 2
    for row, (block, line) in enumerate(zip(shares, values, strict=True)):
        for column, value in enumerate(line):
            picked = directions[column] in chosen[block]
            axes.text(column, row, f'{value:.2f}', ha='center', va='center', fontsize=8,
                      color='white' if value > middle else '#222222',
                      fontweight='bold' if picked else 'normal')
            if picked:
                axes.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, fill=False,
                                         edgecolor='#d1495b', linewidth=2))
    axes.set_xticks(range(columns), directions)
    axes.set_yticks(range(rows), list(shares), fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, location='bottom', aspect=40, fraction=0.25 / (1 + _ROW * rows),
                    label='share in % (framed: chosen)')
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
