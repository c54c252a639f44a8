"""Pictures of a training: curves, and which classes are taken for which."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

__all__ = ['draw_confusion', 'draw_curves']

_DPI = 110
_POINTS = 4000  # of a curve; more cannot be told apart
_SMOOTH = 50  # windows that a smoothed curve has
_MOST = 40  # classes whose names can be read
_NUMBERS = 16  # classes whose cells have room for numbers
_LINES = 6


def draw_curves(loss: np.ndarray, rate: np.ndarray, last: int,
                metrics: Mapping[str, Sequence[tuple[float, float]]], per_epoch: int | None = None,
                title: str = '') -> Image.Image:
    """Draw loss, learning rate and metrics over the course of a training.

    Args:
        loss: (n,) of the last n iterations; what is not finite leaves a gap.
        rate: (m,) learning rates of the last m iterations.
        last: number of the last iteration.
        metrics: per name, (iteration, value) for each validation. The first six are drawn.
        per_epoch: iterations of an epoch; None counts in iterations.
        title: a line on top.

    Returns:
        The picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = per_epoch or 1
    figure = Figure(figsize=(12, 3.8), dpi=_DPI, layout='constrained')
    first, second, third = figure.subplots(1, 3)
    _draw_loss(first, *_placed(loss, last, unit))
    first.set_title('loss')
    second.plot(*_placed(rate, last, unit), color='C2')
    second.set_title('learning rate')
    second.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
    for name, points in [*metrics.items()][:_LINES]:
        steps, values = np.array(points, float).reshape(-1, 2).T
        third.plot(steps / unit, values, marker='o', markersize=3, label=_plain(name))
    third.set_title('validation')
    if metrics:
        third.legend(fontsize=8, loc='best')
    else:
        third.text(0.5, 0.5, 'no validation', ha='center', va='center',
                   transform=third.transAxes)
    for axis in (first, second, third):
        axis.set_xlabel('epoch' if per_epoch else 'iteration')
        axis.set_xlim(0, 1.02 * last / unit)
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(_plain(title), fontsize=10)
    return _picture(figure, FigureCanvasAgg)


def _placed(values: np.ndarray, last: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(last - len(values) + 1, last + 1) / unit
    every = max(1, math.ceil(len(values) / _POINTS))
    return steps[::every], values[::every]


def _draw_loss(axis, steps: np.ndarray, values: np.ndarray) -> None:
    values = np.where(np.isfinite(values), values, np.nan)
    axis.plot(steps, values, color='C0', alpha=0.3, linewidth=0.8)
    smooth = _smoothed(values)
    axis.plot(steps, smooth, color='C0', label='moving average')
    known = smooth[np.isfinite(smooth)]
    if len(known):  # the first losses may be a hundred times the others
        low, high = min(0, np.nanmin(values)), np.percentile(known, 98) * 1.3
        if high > low:
            axis.set_ylim(low, high)
        axis.legend(fontsize=8, loc='upper right')


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values of a window that ends at each place."""
    width = max(1, len(values) // _SMOOTH)
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0], np.where(known, values, 0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    with np.errstate(invalid='ignore', divide='ignore'):
        return (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])


def draw_confusion(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str],
                   title: str = '') -> Image.Image:
    """Draw which truth was taken for what, each row as shares of its sum.

    Args:
        counts: (R, C), what is (row) against what was predicted (column). Where there are more
            than 40 rows, those that are confused most are drawn.
        rows: their names.
        columns: theirs. Those that also name a row are drawn with it, the others always.
        title: a line on top.

    Returns:
        The picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts, rows, columns, left_out = _most_confused(counts, list(rows), list(columns))
    sums = counts.sum(1, keepdims=True)
    shares = np.divide(counts, sums, out=np.zeros(counts.shape), where=sums > 0)
    side = max(4.5, 0.32 * max(counts.shape) + 1.5)
    figure = Figure(figsize=(side + 2.2, side + 1), dpi=_DPI, layout='constrained')
    axis = figure.subplots()
    shown = axis.imshow(shares, cmap='Blues', norm=PowerNorm(0.5, 0, 1), aspect='auto')
    names = [[_short(name) for name in group] for group in (columns, rows)]
    axis.set_xticks(range(len(columns)), names[0], rotation=45, ha='right', fontsize=8,
                    rotation_mode='anchor')
    axis.set_yticks(range(len(rows)), names[1], fontsize=8)
    axis.set_xlabel('predicted')
    axis.set_ylabel('truth')
    if len(rows) <= _NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                axis.text(column, row, f'{share:.2f}', ha='center', va='center', fontsize=7,
                          color='white' if share > 0.4 else 'black')
    figure.colorbar(shown, ax=axis, shrink=0.8, aspect=30, label='share of the row')
    more = f'{left_out} classes that are confused less are left out' if left_out else ''
    figure.suptitle(_plain('\n'.join(filter(None, [title, more]))), fontsize=10)
    return _picture(figure, FigureCanvasAgg)


def _most_confused(counts: np.ndarray, rows: list[str], columns: list[str]):
    """Leave out classes that do not occur, and where many are left those without mistakes."""
    inner = min(len(rows), len(columns))
    while inner and rows[:inner] != columns[:inner]:
        inner -= 1  # background and missed objects stand at the end
    occurs = counts[:inner].sum(1) + counts[:, :inner].sum(0)
    diagonal = np.diagonal(counts)[:inner]
    wrong = occurs - 2 * diagonal
    kept = np.flatnonzero(occurs > 0)
    left_out = max(0, len(kept) - _MOST)
    kept = np.sort(kept[np.argsort(-wrong[kept], kind='stable')[:_MOST]])
    if not len(kept):
        kept = np.arange(min(inner, _MOST))
    own = [*kept, *range(inner, len(rows))], [*kept, *range(inner, len(columns))]
    return (counts[np.ix_(*own)], [rows[index] for index in own[0]],
            [columns[index] for index in own[1]], left_out)


def _short(name: str) -> str:
    return _plain(name if len(name) <= 22 else f'{name[:21]}…')


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formulas."""
    return text.replace('$', r'\$')


def _picture(figure, canvas_type) -> Image.Image:
    canvas = canvas_type(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
