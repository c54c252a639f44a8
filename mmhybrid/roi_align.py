"""RoIAlign with average pooling on a CPU, as sums of rows: for the stand-in of :mod:`mmcv_ops`.

A bin is a weighted sum of pixels, and the gradient of a pixel a weighted sum of bins. With channels
last both are sums of whole rows, which ``torch.nn.functional.embedding_bag`` computes in vector
instructions and in several threads. torchvision's kernels go through a map channel by channel, and
their backward pass in one thread.

For the gradient the taps are sorted by pixel, so that its sums have one order with any number of
threads.

Along an axis the weights of a bin depend on that axis alone, so each axis has a small table, and
the weight of a pixel is a product. Names: R RoIs, P bins along an axis, T taps (pixels with a
weight) of a bin along an axis, C channels.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['pays', 'roi_align', 'roi_align_gradient']

EVERYBODY = slice(None)
_MOST_TAPS = 2 ** 22  # in one table: 48 MiB


def pays(shape: tuple[int, ...], rois: int, size: tuple[int, int]) -> bool:
    """Whether so many RoIs are worth a copy of the maps with channels last."""
    return 8 * rois * math.prod(size) > shape[0] * shape[2] * shape[3]


def roi_align(maps: Tensor, rois: Tensor, size: tuple[int, int], scale: float, samples: int,
              aligned: bool) -> Tensor:
    """Average of the samples in each bin, which are interpolated between four pixels.

    Args:
        maps: (N, C, H, W) float32 or float64.
        rois: (R, 5) image index, x1, y1, x2, y2 in the pixels of the input image; dtype of `maps`.
        size: bins along height and width.
        scale: pixels of a map per pixel of the image.
        samples: of a bin along an axis; 0 chooses ceil(RoI size / bins).
        aligned: shift by half a pixel, and do not force RoIs to be one pixel large.

    Returns:
        (R, C, *size), channels last in memory.
    """
    rows = _rows(maps.detach())
    bins = rows.new_empty(len(rois), *size, rows.shape[1])
    for part, taps, weights in _tables(rois, maps.shape, size, scale, samples, aligned):
        sums = F.embedding_bag(taps, rows, mode='sum', per_sample_weights=weights)
        bins[part] = sums.view(-1, *bins.shape[1:])
    return bins.permute(0, 3, 1, 2)


def roi_align_gradient(grad: Tensor, rois: Tensor, shape: tuple[int, ...], scale: float,
                       samples: int, aligned: bool) -> Tensor:
    """Gradient of :func:`roi_align` with respect to maps of `shape`, given that of its result.

    Returns:
        `shape`, channels last in memory.
    """
    batch, channels, height, width = shape
    size = grad.shape[2:]
    bins = _rows(grad.detach()).view(len(rois), math.prod(size), channels)
    total = None
    for part, taps, weights in _tables(rois, shape, size, scale, samples, aligned):
        pixels, order = taps.flatten().sort()
        counts = pixels.bincount(minlength=batch * height * width)
        sums = F.embedding_bag(
            order.div(taps.shape[1], rounding_mode='floor'), bins[part].flatten(0, 1),
            counts.cumsum(0) - counts, mode='sum', per_sample_weights=weights.flatten()[order])
        total = sums if total is None else total.add_(sums)
    if total is None:
        total = grad.new_zeros(batch * height * width, channels)
    return total.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _tables(rois, shape, size, scale, samples, aligned) -> Iterator[tuple]:
    """Yield which RoIs, and of their bins the taps and weights, both (bins of these RoIs, taps).

    A tap is the number of a pixel, counted through all maps.
    """
    start = rois[:, [2, 1]] * scale - (0.5 if aligned else 0.0)  # along height and width
    extent = rois[:, [4, 3]] * scale - (0.5 if aligned else 0.0) - start
    if not aligned:
        extent = extent.clamp(min=1)
    if samples:
        counts = torch.full_like(extent, samples, dtype=torch.int64)
    else:
        counts = (extent / extent.new_tensor(size)).ceil().long().clamp(min=0)
    for alike in _alike(counts):
        (y, of_y), (x, of_x) = (
            _axis(start[alike, i], extent[alike, i], counts[alike, i], size[i], shape[2 + i])
            for i in (0, 1))
        y = y * shape[3] + (rois[alike, 0].long() * (shape[2] * shape[3]))[:, None, None]
        # The product over both axes, with the taps of a bin in one long run.
        repeats = y.shape[2], x.shape[2]
        y, of_y = (each.repeat_interleave(repeats[1], 2)[:, :, None] for each in (y, of_y))
        x, of_x = (each.repeat(1, 1, repeats[0])[:, None] for each in (x, of_x))
        step = max(1, _MOST_TAPS // (math.prod(size) * math.prod(repeats)))
        for begin in range(0, len(y), step):
            part = slice(begin, begin + step)
            yield (part if alike is EVERYBODY else alike[part],
                   (y[part] + x[part]).flatten(0, 2), (of_y[part] * of_x[part]).flatten(0, 2))


def _alike(counts: Tensor) -> list[slice] | list[Tensor]:
    """Sets of RoIs whose numbers of samples differ by less than a factor of two."""
    kinds = counts.amax(1).clamp(min=1).double().log2().ceil()
    present = kinds.unique().tolist()
    if len(present) == 1:
        return [EVERYBODY]
    return [(kinds == kind).nonzero()[:, 0] for kind in present]


def _axis(start: Tensor, extent: Tensor, counts: Tensor, bins: int, length: int):
    """Taps and weights along one axis, both (R, P, T).

    Args:
        start, extent: (R,) of the RoIs, in pixels of the map.
        counts: (R,) samples of a bin.
        bins: P.
        length: of the map.
    """
    start, extent, counts = (each[:, None, None] for each in (start, extent, counts))
    number = torch.arange(int(counts.max()))
    share = (number < counts) / counts.clamp(min=1).to(start.dtype)
    number = torch.minimum(number, (counts - 1).clamp(min=0))
    bin_size = extent / bins
    position = (start + torch.arange(bins)[:, None] * bin_size
                + (number + 0.5) * (bin_size / counts.clamp(min=1)))
    share = share * ((position >= -1) & (position <= length))
    position = position.clamp(0, length - 1)
    low = position.long().clamp(0, length - 1)  # NaN has become some number
    upper = (position - low) * share
    taps = torch.cat([low, (low + 1).clamp(max=length - 1)], dim=2)
    weights = torch.cat([share - upper, upper], dim=2)
    return _merged(low, taps, weights, length)


def _merged(low: Tensor, taps: Tensor, weights: Tensor, length: int):
    """The same sums over all pixels between the outermost taps of a bin, if these are fewer."""
    if not taps.shape[2]:
        return taps, weights
    ends = low[:, :, :1], low[:, :, -1:]  # a RoI with a negative size runs backwards
    first = torch.minimum(*ends)
    window = int((torch.maximum(*ends) - first).max()) + 2
    if window >= taps.shape[2]:
        return taps, weights
    merged = weights.new_zeros(*weights.shape[:2], window).scatter_add_(2, taps - first, weights)
    return (first + torch.arange(window)).clamp(max=length - 1), merged
