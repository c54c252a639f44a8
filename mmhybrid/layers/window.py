"""Maps to windows of tokens and back: a pair of pure functions."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ['window_partition', 'window_unpartition']


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut a map into square windows of tokens.

    The map is padded with zeros on the right and at the bottom up to multiples of the window.  The
    padding becomes ordinary tokens.

    Args:
        x: (B, C, H, W).
        window: side of a window in pixels.

    Returns:
        (B * rows * columns, window * window, C), contiguous; the image is the slowest part of the
        first axis, tokens are in row-major order.
    """
    B, C, H, W = x.shape
    rows, columns = -(-H // window), -(-W // window)
    if rows * window != H or columns * window != W:
        x = F.pad(x, (0, columns * window - W, 0, rows * window - H))
    x = x.reshape(B, C, rows, window, columns, window).permute(0, 2, 4, 3, 5, 1)
    # contiguous: with one window the reshape may be a strided view, which every layer would copy
    return x.reshape(B * rows * columns, window * window, C).contiguous()


def window_unpartition(tokens: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Undo :func:`window_partition` and crop the padding.

    Args:
        tokens: (B * rows * columns, window * window, C).
        window: side of a window in pixels.
        size: (H, W) of the map before padding.

    Returns:
        (B, C, H, W); a view with channels last in memory.
    """
    H, W = size
    rows, columns = -(-H // window), -(-W // window)
    C = tokens.shape[-1]
    x = tokens.view(-1, rows, columns, window, window, C).transpose(2, 3)
    x = x.reshape(-1, rows * window, columns * window, C)[:, :H, :W]
    return x.permute(0, 3, 1, 2)
