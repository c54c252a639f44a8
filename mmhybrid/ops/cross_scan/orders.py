"""Named scan directions and the order tables behind them."""
from __future__ import annotations

import contextlib
import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reorder import inverse_of, reorder

__all__ = ['DIRECTIONS', 'Direction', 'ScanOrder', 'ScanPlan', 'scan_plan']

# The canonical order: the index order of LocalMamba's direction search (arXiv 2403.09338).
DIRECTIONS = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')

_NAME = re.compile(r'(?:(?P<axis>[hv])|w(?P<window>[1-9]\d*))(?P<flip>_flip)?')
# A four-stage backbone has sixteen pairs of tables per image size and at most a plan per block.
_MAX_CACHED_TABLES = 64
_MAX_CACHED_PLANS = 128


@dataclass(frozen=True)
class Direction:
    """One named way to read a map.

    Attributes:
        kind: 'h' row by row, 'v' column by column, 'w' window by window (row-major over the grid
            of windows and inside each window).
        window: side of the window; 0 unless ``kind`` is 'w'.
        flip: whether it is read from its end to its start.
    """

    kind: str
    window: int
    flip: bool

    @classmethod
    def parse(cls, name: str) -> Direction:
        """Read a name such as ``h``, ``v_flip`` or ``w7``; ``ValueError`` for any other."""
        return cls(*_parsed(name))


@torch.compiler.assume_constant_result  # the compiler cannot trace regular expressions
def _parsed(name: str) -> tuple[str, int, bool]:
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"unknown scan direction {name!r}: expected 'h', 'v' or 'w<window side>' (as in "
            f"'w7'), each optionally followed by '_flip'; the usual ones are "
            f"{', '.join(DIRECTIONS)}")
    return match['axis'] or 'w', int(match['window'] or 0), match['flip'] is not None


class ScanOrder:
    """One order of the tokens of a map, and the way back.

    Attributes:
        length: L', number of positions of the sequence; larger than the number of tokens L where
            windows overhang the map.
        order: int32 (L',); the token read at each position, -1 for a zero token.
        inverse: int32 (L,); the position at which each token is read.
        restored_from: int32 (L,); the position whose result each token gets.
        overhang: side of the windows if some of them overhang the map, else 0; orders of a map
            with the same overhang have the same length.
        identity: whether the sequence is the map itself.
        exact: whether restoring undoes taking (not so for the released column restore).
    """

    def __init__(self, order: Tensor, inverse: Tensor, *, overhang: int = 0,
                 identity: bool = False, exact: bool = True):
        self.length = order.shape[0]
        self.overhang, self.identity, self.exact = overhang, identity, exact
        self.order, self.inverse = order, inverse
        # The released column restore reads as if the sequence were the map read by columns.
        self.restored_from = inverse if exact else order

    def take(self, x: Tensor) -> Tensor:
        """Tokens (..., L) in row-major order -> sequence (..., L')."""
        if self.identity:
            return x
        return reorder(x, self.order, self.inverse, self.overhang > 0, False)

    def restore(self, y: Tensor) -> Tensor:
        """Sequence (..., L') -> tokens (..., L) in row-major order; zero tokens are dropped."""
        if self.identity:
            return y
        back = self.order if self.exact else self.inverse
        return reorder(y, self.restored_from, back, False, self.overhang > 0)

    def displace(self, y: Tensor) -> Tensor:
        """Results (..., L) at the tokens that were scanned -> where :meth:`restore` puts them."""
        return y if self.exact else self.restore(self.take(y))


# An operator, so that a compiler sees one node where there would be ten, whatever the size.
_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_library.define('scan_tables(Tensor like, str kind, int window, bool flip, SymInt height, '
                'SymInt width, SymInt? class_token) -> (Tensor order, Tensor inverse)')
_scan_tables = torch.ops.mmhybrid.scan_tables


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
        exact: whether restoring undoes taking in every direction.
    """

    directions: tuple[str, ...]
    reverse: tuple[bool, ...]
    order_ids: tuple[int, ...]
    orders: tuple[ScanOrder, ...]
    num_tokens: int
    exact: bool = True
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def order_of(self, k: int) -> ScanOrder:
        """The order that direction ``k`` follows, from its start or from its end."""
        return self.orders[self.order_ids[k]]

    def take(self, x: Tensor) -> list[Tensor]:
        """Tokens (..., L) -> K sequences (..., L'_k); directions of one order share theirs."""
        taken = [order.take(x) for order in self.orders]
        return [taken[i] for i in self.order_ids]

    def restore(self, ys: Sequence[Tensor]) -> list[Tensor]:
        """K sequences (..., L'_k) -> K results (..., L) in row-major order."""
        return [self.order_of(k).restore(y) for k, y in enumerate(ys)]

    def restored_sum(self, ys: Sequence[Tensor]) -> Tensor:
        """The sum of what :meth:`restore` gives; directions of one order go back together."""
        sums = [functools.reduce(torch.add, [y for y, of in zip(ys, self.order_ids, strict=True)
                                             if of == i]) for i in range(len(self.orders))]
        return functools.reduce(
            torch.add, [order.restore(y) for order, y in zip(self.orders, sums, strict=True)])

    def displace(self, y: Tensor) -> list[Tensor]:
        """K results (B, K, D, L) at the tokens that were scanned -> where :meth:`restore` puts
        them, in stacks (B, k, D, L)."""
        if self.exact:
            return [y]
        return [self.order_of(k).displace(y_k).unsqueeze(1) for k, y_k in enumerate(y.unbind(1))]

    def groups(self) -> list[tuple[bool, list[int]]]:
        """Directions that one scan without tables takes together: (reverse, their indices)."""
        grouped: dict[tuple[bool, int], list[int]] = {}
        for k, reverse in enumerate(self.reverse):
            key = reverse, self.order_of(k).overhang
            grouped[key] = [*grouped.get(key, ()), k]
        return [(reverse, ks) for (reverse, _), ks in grouped.items()]

    def scan_order(self) -> Tensor:
        """int32 (K, S): the token read at each position of each direction, -1 for a zero token.

        The flips are in the table, so that one scan serves directions of both senses.  S is the
        length of the longest sequence; shorter ones read zero tokens after their end, where they
        change no result.
        """
        def build():
            length = max(order.length for order in self.orders)
            rows = []
            for k, reverse in enumerate(self.reverse):
                order = self.order_of(k)
                row = order.order.flip(0) if reverse else order.order
                rows.append(F.pad(row, (0, length - order.length), value=-1))
            return torch.stack(rows)

        return self._keep('scan_order', build)

    def permutation(self) -> Tensor:
        """int32 (K, S): :meth:`scan_order` with an index for every zero token, from L on.

        For what stores a value also for zero tokens: S of them, in each row once.
        """
        def build():
            order = self.scan_order()
            zero = order < 0
            return torch.where(zero, self.num_tokens - 1 + zero.cumsum(1), order).int()

        return self._keep('permutation', build)

    def inverse_permutation(self) -> Tensor:
        """int32 (K, S): the position at which each index of :meth:`permutation` is read."""
        def build():
            return inverse_of(self.permutation(), self.permutation().shape[1]).int()

        return self._keep('inverse_permutation', build)

    def _keep(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        with _for_training():
            table = build()
        if _worth_keeping(table):
            self._kept[name] = table
        return table


def scan_plan(directions: Sequence[str], height: int, width: int,
              device: torch.device | str = 'cpu', *, restore: str = 'exact',
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
    directions, device = tuple(directions), torch.device(device)
    if _traced(device):  # the tables become part of the graph, for any size
        return _build_plan(directions, height, width, device, restore, class_token)
    return _cached(_PLANS, _MAX_CACHED_PLANS, _build_plan,
                   (directions, height, width, device, restore, class_token))


def _build_plan(directions, height, width, device, restore, class_token) -> ScanPlan:
    if not directions:
        raise ValueError('a scan needs at least one direction, got an empty list; name some of '
                         f"{', '.join(DIRECTIONS)}")
    if restore not in ('exact', 'released'):
        raise ValueError(f"restore must be 'exact' or 'released', got {restore!r}")
    order_ids, reverse, orders = [], [], {}
    for name in directions:
        direction = Direction.parse(name)
        # Without a class token both senses share an order.
        flip = direction.flip and class_token is not None
        key = direction.kind, direction.window, flip
        if key not in orders:
            released = restore == 'released' and direction.kind == 'v'
            orders[key] = len(orders), _build_order(*key, height, width, device, released,
                                                    class_token)
        order_ids.append(orders[key][0])
        reverse.append(direction.flip)
    return ScanPlan(directions, tuple(reverse), tuple(order_ids),
                    tuple(order for _, order in orders.values()),
                    height * width + int(class_token is not None),
                    all(order.exact for _, order in orders.values()))


_PLANS: OrderedDict[tuple, ScanPlan] = OrderedDict()
_TABLES: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()


# What a CUDA graph reads must outlive it, and nobody tells when a graph is gone.
_HELD_FOR_GRAPHS: dict[int, ScanPlan | tuple[Tensor, Tensor]] = {}


def _cached(cache: OrderedDict, size: int, build, key: tuple):
    """What ``build(*key)`` gives; the most recently used results are kept."""
    if key in cache:
        cache.move_to_end(key)
        found = cache[key]
        if _capturing(_a_table(found)):
            _HELD_FOR_GRAPHS[id(found)] = found
        return found
    with _for_training():
        found = build(*key)
    if _worth_keeping(_a_table(found)):
        cache[key] = found
        if len(cache) > size:
            cache.popitem(last=False)
    return found


def _a_table(found: ScanPlan | tuple[Tensor, Tensor]) -> Tensor:
    return found.orders[0].order if isinstance(found, ScanPlan) else found[0]


def _capturing(table: Tensor) -> bool:
    return table.is_cuda and torch.cuda.is_current_stream_capturing()


def _for_training():
    """Tables made in inference mode could not take part in a later backward pass."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _traced(device: torch.device) -> bool:
    """Whether a compiler or a mode watches, for which tensors are not what they seem."""
    if torch.compiler.is_compiling():
        return True
    watched = torch._C._len_torch_dispatch_stack() > 0
    return watched and type(torch.empty(0, device=device)) is not Tensor


def _worth_keeping(table: Tensor) -> bool:
    """False for what must not outlive the moment.

    That is what a tracer sees in place of a tensor, and what the capture of a CUDA graph makes,
    which has values only once the graph is replayed.
    """
    if torch.compiler.is_compiling() or type(table) is not Tensor:
        return False
    return not _capturing(table)


def _build_order(kind, window, flip, height, width, device, released, class_token) -> ScanOrder:
    exact = not released or height == width
    overhang = window if kind == 'w' and (height % window or width % window) else 0
    identity = kind == 'h'
    if class_token is not None:
        if not exact:
            raise ValueError(
                f"restore='released' has no meaning for a class token on a {height} x {width} map: "
                "the release only takes square ones; use restore='exact'")
        identity = identity and (not flip or height * width - class_token == class_token)
    key = kind, window, flip, height, width
    if _traced(device):
        tables = _scan_tables(torch.empty(0, device=device), *key, class_token)
    else:
        tables = _cached(_TABLES, _MAX_CACHED_TABLES, _tables, (device, *key, class_token))
    return ScanOrder(*tables, overhang=overhang, identity=identity, exact=exact)


@torch.library.impl(_library, 'scan_tables', 'CompositeExplicitAutograd')
def _copied_tables(like, *key):
    key = like.device, *key
    if key not in _TABLES and like.is_cuda and not _capturing(like):
        # torch.compile(mode='reduce-overhead') lets this thread allocate from a pool in which
        # nothing but results may stay; what is cached has to come from elsewhere.
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(_cache_tables, key).result()
    tables = _cached(_TABLES, _MAX_CACHED_TABLES, _tables, key)
    # Copies, because a compiler may write other things to the results once they are used.
    return tuple(table.clone() for table in tables)


def _cache_tables(key: tuple) -> None:
    with torch.cuda.device(key[0]):
        _cached(_TABLES, _MAX_CACHED_TABLES, _tables, key)
        torch.cuda.current_stream().synchronize()  # the stream of another thread reads them


@torch.library.register_fake('mmhybrid::scan_tables', lib=_library)
def _tables_fake(like, kind, window, flip, height, width, class_token):
    extra = int(class_token is not None)
    length = height * width
    if kind == 'w':
        length = -(-height // window) * (-(-width // window)) * window * window
    return (like.new_empty((length + extra,), dtype=torch.int32),
            like.new_empty((height * width + extra,), dtype=torch.int32))


def _tables(device, kind, window, flip, height, width, class_token) -> tuple[Tensor, Tensor]:
    """The token read at each position, -1 for a zero token; and the position of each token."""
    order, inverse = _map_tables(kind, window, height, width, device)
    if class_token is not None:
        # The index counts along the direction, so from the end of the order when that is flipped.
        at = order.shape[0] - class_token if flip else class_token
        order = _inserted(order + (order >= class_token), at, class_token)
        inverse = _inserted(inverse + (inverse >= at), class_token, at)
    return order.int(), inverse.int()


def _map_tables(kind: str, window: int, height: int, width: int, device: torch.device
                ) -> tuple[Tensor, Tensor]:
    """The same without class token and flip."""
    row = torch.arange(height, device=device)[:, None]
    col = torch.arange(width, device=device)[None]
    token = row * width + col
    if kind == 'h':
        return token.flatten(), token.flatten()
    if kind == 'v':
        return token.T.flatten(), (col * height + row).flatten()
    rows, cols = -(-height // window), -(-width // window)
    inverse = ((row // window * cols + col // window) * window + row % window) * window
    row = torch.arange(rows * window, device=device).view(rows, 1, window, 1)
    inner = torch.arange(cols * window, device=device).view(1, cols, 1, window)
    order = torch.where((row < height) & (inner < width), row * width + inner, -1)
    return order.flatten(), (inverse + col % window).flatten()


def _inserted(table: Tensor, at: int, value: int) -> Tensor:
    return torch.cat([table[:at], table.new_full((1,), value), table[at:]])
