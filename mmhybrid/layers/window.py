"""Maps to windows of tokens and back, and windows that fit a map: pure functions."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['exporting', 'near_equal', 'window_partition', 'window_unpartition', 'windows_along']


def window_partition(x: Tensor, window: int | tuple[int, int]) -> Tensor:
    """Cut a map into windows of tokens.

    The map is padded with zeros on the right and at the bottom up to multiples of the window.  The
    padding becomes ordinary tokens.

    Args:
        x: (B, C, H, W).
        window: side of a window in pixels, or its height h and width w.

    Returns:
        (B * rows * columns, h * w, C), contiguous; the image is the slowest part of the first
        axis, tokens are in row-major order.  A view of a map with channels last in memory that is
        one window.
    """
    B, C, H, W = x.shape
    h, w = _sides(window)
    rows, columns = windows_along(H, h), windows_along(W, w)
    # A compiler would ask for each size anew whether there is something to pad.
    if torch.compiler.is_compiling() or rows * h != H or columns * w != W:
        x = F.pad(x, (0, columns * w - W, 0, rows * h - H))
    x = x.permute(0, 2, 3, 1).reshape(B, rows, h, columns, w, C).transpose(2, 3)
    # contiguous: with one window the reshape may be a strided view, which every layer would copy
    return x.reshape(B * rows * columns, h * w, C).contiguous()


def window_unpartition(tokens: Tensor, window: int | tuple[int, int],
                       size: tuple[int, int]) -> Tensor:
    """Undo :func:`window_partition` and crop the padding.

    Args:
        tokens: (B * rows * columns, h * w, C).
        window: side of a window in pixels, or its height h and width w.
        size: (H, W) of the map before padding.

    Returns:
        (B, C, H, W); a view with channels last in memory.
    """
    H, W = size
    h, w = _sides(window)
    rows, columns = windows_along(H, h), windows_along(W, w)
    C = tokens.shape[-1]
    x = tokens.view(-1, rows, columns, h, w, C).transpose(2, 3)
    x = x.reshape(-1, rows * h, columns * w, C)[:, :H, :W]
    return x.permute(0, 3, 1, 2)


def windows_along(side: int, window: int) -> int:
    """Number of windows that it takes to hold a side.

    That is said apart for one window, behind which a compiler that has the side as a variable then
    finds constants.
    """
    if exporting():  # the number follows the side, also of one window
        return (side + window - 1) // window  # ONNX divides negative numbers towards zero
    return 1 if side <= window else -(-side // window)


def exporting() -> bool:
    """Whether ``torch.export`` follows, for which no branch may depend on a size."""
    return getattr(torch.compiler, 'is_exporting', bool)()


def near_equal(side: int, window: int) -> list[tuple[int, int]]:
    """Cut a side into as few windows as have no more than ``window`` pixels, and need no padding.

    Args:
        side: pixels of the map.
        window: pixels of a window at most.

    Returns:
        One pair (number, pixels) where the windows come out equal, else two, the wider first;
        their pixels differ by one.
    """
    number = windows_along(side, window)
    pixels, wider = side // number, side % number  # compilers know no divmod of variables
    pairs = (wider, pixels + 1), (number - wider, pixels)
    return [pair for pair in pairs if pair[0]]


def _sides(window: int | tuple[int, int]) -> tuple[int, int]:
    return window if isinstance(window, tuple) else (window, window)
