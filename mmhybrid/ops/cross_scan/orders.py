"""Named scan directions and the order tables behind them."""
from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ['DIRECTIONS', 'Direction', 'ScanOrder', 'ScanPlan', 'scan_plan']

# The canonical order: the index order of LocalMamba's direction search (arXiv 2403.09338).
DIRECTIONS = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')

_NAME = re.compile(r'(?:(?P<axis>[hv])|w(?P<window>[1-9]\d*))(?P<flip>_flip)?')
# Twelve tables serve one image size of a four-stage backbone, so this holds a handful of sizes.
_MAX_CACHED_ORDERS = 64


@dataclass(frozen=True)
class Direction:
    """One named way to walk over a map.

    Attributes:
        kind: 'h' row by row, 'v' column by column, 'w' window by window (row-major over the grid
            of windows and inside each window).
        window: side of the window; 0 unless ``kind`` is 'w'.
        flip: whether the walk is taken from its end to its start.
    """

    kind: str
    window: int
    flip: bool

    @classmethod
    def parse(cls, name: str) -> Direction:
        """Read a name such as ``h``, ``v_flip`` or ``w7``; ``ValueError`` for any other."""
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise ValueError(
                f"unknown scan direction {name!r}: expected 'h', 'v' or 'w<window side>' (as in "
                f"'w7'), each optionally followed by '_flip'; the usual ones are "
                f"{', '.join(DIRECTIONS)}")
        window = int(match['window'] or 0)
        return cls(match['axis'] or 'w', window, match['flip'] is not None)


class ScanOrder:
    """One order of the tokens of a map, and the way back.

    Attributes:
        length: L', number of positions of the sequence; larger than the number of tokens L where
            windows overhang the map.
        order: int32 (L',); the token read at each position, -1 for a zero token.
        place: int32 (L,); the position from which each token is restored.
        identity: whether the sequence is the map itself.
        exact: whether restoring undoes taking (not so for the released column restore).
    """

    def __init__(self, order: np.ndarray, inverse: np.ndarray, place: np.ndarray,
                 unplace: np.ndarray, device: torch.device):
        self.length = order.size
        self.exact = np.array_equal(place, inverse)
        self.identity = self.exact and np.array_equal(order, np.arange(place.size))
        self.order, self.place = _tensor(order, device), _tensor(place, device)
        # Each table travels with the one that its gradient reads.
        self._take = _Table(order, device), _Table(inverse, device)
        self._restore = _Table(place, device), _Table(unplace, device)

    def take(self, x: Tensor) -> Tensor:
        """Tokens (..., L) in row-major order -> sequence (..., L')."""
        return x if self.identity else _Reorder.apply(x, *self._take)

    def restore(self, y: Tensor) -> Tensor:
        """Sequence (..., L') -> tokens (..., L) in row-major order; zero tokens are dropped."""
        return y if self.identity else _Reorder.apply(y, *self._restore)


class _Table:
    """A gather index; positions that read nothing (-1) become zeros."""

    def __init__(self, index: np.ndarray, device: torch.device):
        empty = np.flatnonzero(index < 0)
        self.index = _tensor(index.clip(min=0), device)
        self.empty = _tensor(empty, device).long() if empty.size else None

    def __call__(self, x: Tensor) -> Tensor:
        # torch.gather with an expanded index: several times faster than index_select on a CPU.
        index = self.index.long().expand(*x.shape[:-1], -1)
        out = x.gather(-1, index)
        return out if self.empty is None else out.index_fill_(-1, self.empty, 0)


class _Reorder(torch.autograd.Function):
    """Read by one table; the gradient reads by its inverse (no scatter, no atomics)."""

    @staticmethod
    def forward(ctx, x, table, inverse):
        ctx.tables = inverse, table
        return table(x)

    @staticmethod
    def backward(ctx, grad):
        return _Reorder.apply(grad, *ctx.tables), None, None


@dataclass(frozen=True)
class ScanPlan:
    """How a map is read in K directions.

    A direction is an order of the tokens plus a flag: a flipped direction owns no order, it is the
    plain one scanned from its end.  So a scan that can run in reverse needs neither flips nor
    copies, and directions that differ only in the flip share one sequence.

    Attributes:
        directions: the K names.
        reverse: K flags; True where the sequence has to be scanned from its end to its start.
        order_ids: K indices into ``orders``.
        orders: the distinct orders.
        num_tokens: L, tokens of the map (a class token included).
    """

    directions: tuple[str, ...]
    reverse: tuple[bool, ...]
    order_ids: tuple[int, ...]
    orders: tuple[ScanOrder, ...]
    num_tokens: int

    def order_of(self, k: int) -> ScanOrder:
        """The order that direction ``k`` walks along."""
        return self.orders[self.order_ids[k]]

    def groups(self) -> list[tuple[bool, int, list[int]]]:
        """Directions that one scan call can take together: (reverse, length, direction indices)."""
        grouped: dict[tuple[bool, int], list[int]] = {}
        for k, reverse in enumerate(self.reverse):
            grouped.setdefault((reverse, self.order_of(k).length), []).append(k)
        return [(reverse, length, ks) for (reverse, length), ks in grouped.items()]


def scan_plan(directions, height: int, width: int, device='cpu', *, restore: str = 'exact',
              class_token: int | None = None) -> ScanPlan:
    """Order tables for a map of ``height`` x ``width`` tokens; tables are cached.

    Args:
        directions: names, see :class:`Direction`.  Their position is the index of the weights.
        height, width: size of the map in tokens.
        device: where the tables live.
        restore: 'exact', or 'released' for the column restore of the LocalMamba release, which
            puts results of ``v`` and ``v_flip`` on wrong tokens unless the map is square.
        class_token: index of one extra token in the row-major token list (L = H * W + 1).  It is
            read at the same index of every scanned sequence (LocalVim with a middle class token).

    Raises:
        ValueError: for an unknown direction, an empty list, or an unknown ``restore``.
    """
    directions = tuple(directions)
    if not directions:
        raise ValueError('a scan needs at least one direction, got an empty list; name some of '
                         f"{', '.join(DIRECTIONS)}")
    if restore not in ('exact', 'released'):
        raise ValueError(f"restore must be 'exact' or 'released', got {restore!r}")
    device = torch.device(device)
    order_ids, reverse, orders = [], [], {}
    for name in directions:
        direction = Direction.parse(name)
        flip = direction.flip and class_token is not None
        key = (direction.kind, direction.window, flip, height, width, device,
               restore if direction.kind == 'v' else 'exact', class_token)
        orders.setdefault(key, (len(orders), _cached_order(key)))
        order_ids.append(orders[key][0])
        reverse.append(direction.flip)
    return ScanPlan(directions, tuple(reverse), tuple(order_ids),
                    tuple(order for _, order in orders.values()),
                    height * width + (class_token is not None))


_CACHE: OrderedDict[tuple, ScanOrder] = OrderedDict()


def _cached_order(key: tuple) -> ScanOrder:
    if key in _CACHE:
        _CACHE.move_to_end(key)
        return _CACHE[key]
    # Tables made in inference mode could not take part in a later backward pass.
    with torch.inference_mode(False):
        order = _build_order(*key)
    # Tables made while a tracer watches are no real tensors and must not outlive it.
    if type(order.order) is Tensor:
        _CACHE[key] = order
        if len(_CACHE) > _MAX_CACHED_ORDERS:
            _CACHE.popitem(last=False)
    return order


def _build_order(kind, window, flip, height, width, device, restore, class_token) -> ScanOrder:
    order = _token_order(kind, window, height, width)
    if class_token is not None:
        order = np.where(order >= class_token, order + 1, order)
        # The index counts along the walk, so from the end of the order when that is flipped.
        at = order.size - class_token if flip else class_token
        order = np.insert(order, at, class_token)
    num_tokens = height * width + (class_token is not None)
    inverse = _inverse(order, num_tokens)
    if restore == 'exact':
        return ScanOrder(order, inverse, inverse, order, device)
    if class_token is not None and height != width:
        raise ValueError(f"restore='released' has no meaning for a class token on a {height} x "
                         f"{width} map: the release only takes square ones; use restore='exact'")
    place = inverse if height == width else _token_order('v', 0, height, width)
    return ScanOrder(order, inverse, place, _inverse(place, order.size), device)


def _token_order(kind: str, window: int, height: int, width: int) -> np.ndarray:
    """(L',): the row-major token read at each position, -1 outside of the map."""
    if kind == 'w':
        rows, cols = -(-height // window), -(-width // window)
        row = np.arange(rows * window).reshape(rows, 1, window, 1)
        col = np.arange(cols * window).reshape(1, cols, 1, window)
        token = np.where((row < height) & (col < width), row * width + col, -1)
        return token.reshape(-1)
    token = np.arange(height * width).reshape(height, width)
    return (token.T if kind == 'v' else token).reshape(-1)


def _inverse(order: np.ndarray, size: int) -> np.ndarray:
    """For each of ``size`` tokens the position at which ``order`` reads it."""
    inverse = np.empty(size, dtype=np.int64)
    inside = order >= 0
    inverse[order[inside]] = np.flatnonzero(inside)
    return inverse


def _tensor(table: np.ndarray, device: torch.device) -> Tensor:
    # From numpy, so that the table has values also where torch only tracks shapes.
    return torch.tensor(table, dtype=torch.int32, device=device)
