"""CUDA graphs of a module's forward and backward pass, for training and evaluation.

A training step of a backbone is a thousand or two launches, each of which costs Python and the
driver more than the GPU. A CUDA graph is recorded once for one shape and replayed with one launch.

``torch.cuda.make_graphed_callables`` does the same for a module that only ever sees one shape. It
does not suffice here: all shapes would have to be known, and recorded, before the first step; its
warm-up counts in BatchNorm statistics and draws random numbers; it hands out the graph's own
outputs, which the next replay overwrites, and gradients that accumulation would add to themselves;
nothing drops old graphs; autocast has to be arranged by the caller; and an error while recording
ends the training. Several shapes in one pool need a rule for who may use it when, which is here:

- Graphs share their working memory, so one may run between the forward and the backward pass of
  another only without it. While a backward pass is due, other calls run eagerly.
- What goes in and out lies in memory of our own (:class:`_Arena`), shared as well, and is copied
  out after each replay, gradients of all parameters in one piece.
- Parameters are recorded through aliases that share their memory. So no hook of a parameter (DDP's
  for example) runs while recording, and all of them run outside of the graph as ever.
- A graph is found by everything that Python would look at: shape, strides, dtype, grad mode,
  autocast, addresses of parameters and buffers, and plain attributes of all modules (``training``,
  a drop path's rate, ...). One that is out of date is never found.
- Recording starts with an eager run and ends with a replay from the same state; if the two differ,
  the graph is not used. Statistics and random states are then put back.
"""
from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.func import functional_call

from ..ops.selective_scan.launch import eager, fast_apply
from .random_state import get_random_state, set_random_state

__all__ = ['CudaGraphs', 'CudaRecorder', 'Replaced', 'bucket', 'check_numbers', 'missing',
           'use_cuda_graphs']

WARM_UPS = 3  # Triton compiles at the first call, and launches directly from the third on
SMALLEST = 32  # pixels; what backbones and data preprocessors divide sides by
TOLERANCE = 0.05  # of a replay against the eager run, norms of all outputs and gradients
ALIGNMENT = 512  # bytes
PLAIN = frozenset((bool, int, float, str, type(None), tuple, torch.dtype))
MANY_STATES = 64  # of the module's attributes; a module that changes at every call has no graph


def bucket(side: int, divisor: int | None) -> int:
    """Round a side of an image up, so that many sizes become few.

    To a multiple of ``divisor``; below four times that, of the power of two next below a quarter of
    the side, at least 32. So usual sides (160, 224, 384, 512, 640, 768, 1024) stay what they are.

    Args:
        side: in pixels. One that is not a multiple of 32 stays as it is.
        divisor: in pixels, a multiple of 32; None to leave all sides alone.
    """
    if divisor is None or side % SMALLEST:
        return side
    step = min(divisor, max(SMALLEST, 1 << (side.bit_length() - 3)))
    return -(-side // step) * step


def use_cuda_graphs(module: nn.Module, *, divisor: int | None = 128,
                    test_divisor: int | None = None, max_graphs: int = 64,
                    recorder=None) -> CudaGraphs:
    """Let a module on a GPU record and replay its calls, until ``remove()`` of what is returned.

    Args:
        module: takes one tensor (B, C, H, W), returns a tensor or a tuple or list of tensors.
        divisor: see :func:`bucket`; for images in training, which are padded with zeros on the
            right and at the bottom. Maps are cut back, so whatever follows sees its usual sizes.
            128 makes 52 shapes of the 580 of 20000 batches of COCO's training at many scales (two
            images of random ratio), for 12.3 % more pixels; 64 makes 159, for 3.9 %.
        test_divisor: the same in eval mode.
        max_graphs: further ones take the place of those that were used least recently.
        recorder: records and replays; None for :class:`CudaRecorder`.

    Raises:
        TypeError: for something that is not a module, or a number that is not an integer.
        ValueError: for a number out of range.
        RuntimeError: if PyTorch finds no GPU, or the module has graphs already.

    Example:
        >>> graphs = use_cuda_graphs(detector.backbone)  # doctest: +SKIP
        >>> print(graphs.report())  # doctest: +SKIP
    """
    return CudaGraphs(module, divisor=divisor, test_divisor=test_divisor, max_graphs=max_graphs,
                      recorder=recorder)


class CudaGraphs:
    """Graphs of one module, one for each kind of call; see :func:`use_cuda_graphs`.

    A kind of call runs eagerly when it is met first, and is recorded at the second time. One whose
    graph was dropped waits twice as long before it is recorded again.
    """

    def __init__(self, module: nn.Module, *, divisor: int | None = 128,
                 test_divisor: int | None = None, max_graphs: int = 64, recorder=None):
        if not isinstance(module, nn.Module):
            raise TypeError(f'got {type(module).__name__}, expected a torch.nn.Module to make CUDA '
                            'graphs of')
        check_numbers(divisor, test_divisor, max_graphs)
        if isinstance(module.__dict__.get('forward'), Replaced):
            raise RuntimeError(f'the forward function of this {type(module).__name__} is replaced '
                               'already (CUDA graphs, torch.compile); remove() that first')
        if recorder is None:
            if (reason := missing()) is not None:
                raise RuntimeError(reason)
            recorder = CudaRecorder()
        self.module, self.recorder = module, recorder
        self.divisors = {True: divisor, False: test_divisor}
        self.max_graphs = max_graphs
        self.closed: str | None = None  # why nothing is recorded any more
        self._forward = module.forward
        self._watched = _Watched(module)
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._waits: Counter[tuple] = Counter()  # calls since a kind was met or dropped
        self._recordings: Counter[tuple] = Counter()
        self._due: weakref.ref | None = None
        self._arena = _Arena()
        self._shapes: set[tuple] = set()
        self._kinds: set[tuple] = set()
        self._count: Counter[str] = Counter()
        self._replaced = Replaced(module, self._call)

    def remove(self) -> None:
        """Give the module its own forward function back, and the memory to PyTorch."""
        self.closed = 'they were removed'
        self._graphs.clear()
        self._arena = _Arena()
        self._replaced.remove()

    def report(self) -> str:
        """What was recorded and replayed so far, in one sentence."""
        count, calls = self._count, max(1, self._count['calls'])
        more = 100 * (count['padded pixels'] / max(1, count['pixels']) - 1)
        return (f'CUDA graphs: {len(self._shapes)} shapes of images, {len(self._kinds)} after '
                f'padding, which adds {more:.1f} % pixels; {count["recorded"]} graphs recorded, '
                f'{count["dropped"]} dropped; {count["replays"]} of {count["calls"]} calls '
                f'replayed ({100 * count["replays"] / calls:.1f} %), {count["new"]} eager because '
                f'they were new, {count["due"]} because a backward pass was due'
                + (f', {count["closed"]} after recording had stopped' if self.closed else '') + '.')

    # --- a call -----------------------------------------------------------------------------------

    def _call(self, *args, **kwargs):
        """What the module's forward function does now."""
        if len(args) != 1 or kwargs or not self._fits(args[0]):
            return self._forward(*args, **kwargs)
        x = args[0]
        padded = self._pad(x)
        self._shapes.add((self.module.training, *x.shape))
        self._kinds.add((self.module.training, *padded.shape))
        self._count['calls'] += 1
        self._count['pixels'] += x.shape[0] * x.shape[-1] * x.shape[-2]
        self._count['padded pixels'] += padded.shape[0] * padded.shape[-1] * padded.shape[-2]
        maps = self._run(padded)
        return maps if padded is x else _cut(maps, x, padded, type(self.module).__name__)

    def _fits(self, x) -> bool:
        return type(x) is Tensor and x.dim() == 4 and self.recorder.takes(x)

    def _pad(self, x: Tensor) -> Tensor:
        divisor = self.divisors[self.module.training]
        height, width = x.shape[-2:]
        if height % SMALLEST or width % SMALLEST:  # it may not be clear how large its maps are
            return x
        more = bucket(height, divisor) - height, bucket(width, divisor) - width
        return F.pad(x, (0, more[1], 0, more[0])) if any(more) else x

    def _run(self, x: Tensor):
        key = self._key(x)
        if key is None:
            self._count['closed'] += 1
            return self._forward(x)
        if self._due is not None and (token := self._due()) is not None and not token.done:
            self._count['due'] += 1
            return self._forward(x)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._record_if_known(key, x)
            if graph is None:
                return self._forward(x)
        self._graphs.move_to_end(key)
        self._count['replays'] += 1
        if graph.backward is None:
            return graph.packed(graph.run(x))
        token = _Token()
        self._due = weakref.ref(token)
        apply = _apply_replay if eager() else _Replay.apply
        return graph.packed(apply(graph, token, x, *graph.weights))

    def _key(self, x: Tensor) -> tuple | None:
        """Everything that decides what the module's code does; None if there is to be no graph."""
        state = self._watched.state()
        if state is None:
            self._close('the module, or one inside it, has hooks, which would not run in a replay')
        elif state == MANY_STATES:
            self._close('attributes of its modules change from call to call')
        kind = x.device.type
        grad = torch.is_grad_enabled()
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad and grad, grad, cast,
               state)
        return None if self.closed and key not in self._graphs else key

    def _close(self, reason: str) -> None:
        if self.closed is None:
            self.closed = reason
            print_log(f'No further CUDA graphs of {type(self.module).__name__}: {reason}. Calls '
                      'without a graph run as they would without --cuda-graphs, on the same '
                      'padded images.', logger='current', level=logging.WARNING)

    # --- recording --------------------------------------------------------------------------------

    def _record_if_known(self, key: tuple, x: Tensor) -> _Graph | None:
        if self._waits[key] < 2 ** self._recordings[key]:
            self._waits[key] += 1
            self._count['new'] += 1
            return None
        while len(self._graphs) >= self.max_graphs:
            dropped, _ = self._graphs.popitem(last=False)
            self._waits[dropped] = 0
            self._count['dropped'] += 1
        try:
            graph = self._record(x)
        except Exception as error:  # whatever a module or the driver objects to
            self._close(f'recording failed for images of {"x".join(map(str, x.shape))} '
                        f'({type(error).__name__}: {error})')
            self._count['closed'] += 1
            return None
        self._recordings[key] += 1
        self._count['recorded'] += 1
        self._graphs[key] = graph
        return graph

    def _record(self, x: Tensor) -> _Graph:
        state, grad = _State(self.module), torch.is_grad_enabled()
        if not self._graphs:
            self.recorder.new_pool()
        with torch.inference_mode(False):
            try:
                return _Graph(self.module, self._forward, x, grad, self.recorder, self._arena,
                              state)
            finally:
                state.restore()


def missing() -> str | None:
    """Why there can be no CUDA graphs here; None if there can."""
    if torch.cuda.is_available():
        return None
    return 'CUDA graphs need an NVIDIA GPU, and PyTorch finds none'


def check_numbers(divisor: int | None, test_divisor: int | None, max_graphs: int) -> None:
    """Raise TypeError or ValueError that names what does not fit."""
    for name, value in dict(divisor=divisor, test_divisor=test_divisor).items():
        if value is not None and type(value) is not int:
            raise TypeError(f'got {name}={value!r}, expected a multiple of {SMALLEST} or None')
        if value is not None and (value < SMALLEST or value % SMALLEST):
            raise ValueError(f'got {name}={value}, expected a multiple of {SMALLEST} such as 128, '
                             'or None to leave sizes alone')
    if type(max_graphs) is not int:
        raise TypeError(f'got max_graphs={max_graphs!r}, expected an integer')
    if max_graphs < 1:
        raise ValueError(f'got max_graphs={max_graphs}, expected at least 1')


class Replaced:
    """Stands in for a module's forward function; a copy of the module gets its own one back.

    Args:
        module: gets it as an attribute of its own.
        new: called instead.
    """

    def __init__(self, module: nn.Module, new: Callable):
        self._module, self._own, self._new = module, module.forward, new
        module.forward = self

    def __call__(self, *args, **kwargs):
        """Call the new function."""
        return self._new(*args, **kwargs)

    def remove(self) -> None:
        """Put the function back, unless somebody has replaced this one as well."""
        if self._module.__dict__.get('forward') is self:
            del self._module.forward
            if self._own != self._module.forward:  # it was a replacement, too
                self._module.forward = self._own

    def __reduce__(self):
        return _same, (self._own,)


def _same(forward):
    return forward


def _cut(maps, x: Tensor, padded: Tensor, name: str):
    """Maps of the size that the unpadded image would have given."""
    if isinstance(maps, Tensor):
        return _cut([maps], x, padded, name)[0]
    cut = []
    for y in maps:
        sides = []
        for axis in (-2, -1):
            whole, part = padded.shape[axis], x.shape[axis]
            stride, rest = divmod(whole, y.shape[axis]) if y.dim() == 4 else (0, 1)
            if rest or part % stride:
                raise ValueError(
                    f'{name} gives {tuple(y.shape)} for a padded image of {tuple(padded.shape)}, '
                    f'which cannot be cut back to that of {tuple(x.shape)}: expected maps whose '
                    'stride divides the sides. Leave padding out with divisor=None '
                    '(cuda_graphs.divisor=None of the tools).')
            sides.append(part // stride)
        cut.append(y[..., :sides[0], :sides[1]].contiguous())
    return type(maps)(cut)


# --- one graph ------------------------------------------------------------------------------------

class _Token:
    """Of one forward pass whose backward pass is due; nothing but the autograd graph holds it."""

    done = False


class _Graph:
    """Recordings of the forward and, with gradients, the backward pass of one kind of call.

    Args:
        module: whose parameters take part.
        forward: its own forward function.
        x: an input like those to come, (B, C, H, W).
        grad: whether there is to be a backward pass.
        recorder: see :class:`CudaRecorder`.
        arena: holds what goes in and out.
        state: what a run of the module changes; on return it is as after one run.

    Attributes:
        weights (list[Tensor]): parameters that get gradients.
        backward: replays the backward pass; None without gradients.

    Raises:
        RuntimeError: if a replay does not give what an eager run gave; whatever recording raises.
    """

    def __init__(self, module: nn.Module, forward: Callable, x: Tensor, grad: bool, recorder,
                 arena: _Arena, state: _State):
        kind = x.device.type
        self._cast = dict(device_type=kind, enabled=torch.is_autocast_enabled(kind),
                          dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
        self._call = _Call(module, forward)
        self._leaves = {f'module.{name}': nn.Parameter(p.detach())
                        for name, p in module.named_parameters() if grad and p.requires_grad}
        self._wanted = list(self._leaves.values())
        self._generators = recorder.generators(x.device)
        self._grad, self._has_dx = grad, grad and x.requires_grad
        self._tape: list[Tensor] | None = None

        maps, grads, sources = self._warm_up(x, recorder, state)
        self._has_dx = self._has_dx and bool(sources) and grads[0] is not None
        self.weights = self._keep_used(module, grads)
        self._carve(x, maps, sources, arena)
        state.restore()
        self._static_x.copy_(x.detach())
        self._record(recorder)
        state.restore()
        self._check(x, maps, [g for g in grads if g is not None])

    def packed(self, maps: Sequence[Tensor]):
        """Maps in the container that the module returns."""
        return maps[0] if self._container is None else self._container(maps)

    # --- running it -------------------------------------------------------------------------------

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward pass; returns maps of their own memory."""
        self._offsets = [generator.get_offset() for generator in self._generators]
        self._static_x.copy_(x.detach())
        self.forward()
        return tuple(y.clone() for y in self._static_maps)

    def gradients(self, given: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor]]:
        """Replay the backward pass; returns the gradients of the input and of ``weights``."""
        given = [g for g, wanted in zip(given, self.differentiable, strict=True) if wanted]
        for static, g in zip(self._static_given, given, strict=True):
            static.zero_() if g is None else static.copy_(g)
        # What is recomputed draws the numbers of its forward pass again.
        now = [generator.get_offset() for generator in self._generators]
        for generator, offset in zip(self._generators, self._offsets, strict=True):
            generator.set_offset(offset)
        self.backward()
        for generator, offset in zip(self._generators, now, strict=True):
            generator.set_offset(offset)
        grads: list[Tensor] = [None] * len(self.weights)
        for flat, places, layouts in self._static_flat:
            pieces = _unflatten_dense_tensors(flat.clone(), layouts.like)
            for i, piece in zip(places, pieces, strict=True):
                grads[i] = piece
            for i, back in layouts.turned.items():
                grads[places[i]] = grads[places[i]].permute(back)
        return (self._static_dx.clone() if self._has_dx else None), grads

    # --- making it --------------------------------------------------------------------------------

    def _warm_up(self, x: Tensor, recorder, state: _State) -> tuple[list, list, list]:
        """Run eagerly. Returns maps and gradients of the last run, and what flowed back in it."""
        found = []

        def run():
            for _ in range(WARM_UPS):
                state.restore()
                before = recorder.host_state()
                self._input = x.detach().clone().requires_grad_(self._has_dx)
                maps = self._maps()
                self.differentiable = [y.requires_grad for y in maps]
                sources = _noise([y for y in maps if y.requires_grad])
                grads = self._grads(maps, sources) if sources else []
                if recorder.host_state() != before:
                    raise RuntimeError('it draws random numbers on the CPU, which a replay would '
                                       'repeat instead of drawing anew')
                found[:] = [y.detach().clone() for y in maps], grads, sources

        recorder.warm_up(run)
        return found

    def _keep_used(self, module: nn.Module, grads: list[Tensor | None]) -> list[Tensor]:
        """Leave parameters out that the maps do not depend on; returns the others."""
        own = grads[len(grads) - len(self._wanted):]
        real = dict(module.named_parameters())
        used = [name for name, g in zip(self._leaves, own, strict=False) if g is not None]
        self._wanted = [self._leaves[name] for name in used]
        return [real[name.removeprefix('module.')] for name in used]

    def _maps(self) -> list[Tensor]:
        with torch.set_grad_enabled(self._grad), torch.autocast(**self._cast):
            maps = functional_call(self._call, self._leaves, (self._input,))
        self._container = None if isinstance(maps, Tensor) else type(maps)
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        if self._container not in (None, tuple, list) or not all(
                isinstance(y, Tensor) for y in maps):
            raise TypeError('expected a tensor, or a tuple or list of tensors, as what it returns, '
                            f'got {self._container.__name__} of '
                            f'{", ".join(sorted({type(y).__name__ for y in maps}))}')
        return maps

    def _grads(self, maps: list[Tensor], sources: list[Tensor]) -> list[Tensor | None]:
        """Gradients of the input, if it is to have one, and of parameters."""
        inputs = [self._input] * self._has_dx + self._wanted
        with torch.autocast(self._cast['device_type'], enabled=False):
            return list(torch.autograd.grad(
                [y for y in maps if y.requires_grad], inputs, sources, allow_unused=True))

    def _carve(self, x: Tensor, maps: list[Tensor], sources: list[Tensor], arena: _Arena) -> None:
        """Find places for all that goes in and out."""
        groups = [[i for i, p in enumerate(self.weights) if p.dtype == dtype]
                  for dtype in dict.fromkeys(p.dtype for p in self.weights)]
        flat = [(self.weights[group[0]], sum(self.weights[i].numel() for i in group))
                for group in groups]
        found = iter(arena.carve([(like, None) for like in (x, *maps, *sources)] + flat
                                 + [(x, None)] * self._has_dx, x.device))
        self._static_x = next(found)
        self._static_maps = [next(found) for _ in maps]
        self._static_given = [next(found) for _ in sources]
        self._static_flat = [(next(found), group, _Layouts([self.weights[i] for i in group]))
                             for group in groups]
        self._static_dx = next(found) if self._has_dx else None
        for static, source in zip(self._static_given, sources, strict=True):
            static.copy_(source)

    def _record(self, recorder) -> None:
        def forward():
            self._input = self._static_x.detach().requires_grad_(self._has_dx)
            maps = self._maps()
            with torch.no_grad():
                for static, y in zip(self._static_maps, maps, strict=True):
                    static.copy_(y)
            self._tape = maps if self._static_given else None

        def backward():
            grads = self._grads(self._tape, self._static_given)
            self._tape = self._input = None
            with torch.no_grad():
                if self._has_dx:
                    self._static_dx.copy_(grads.pop(0))
                for flat, group, layouts in self._static_flat:
                    flat.copy_(_flatten_dense_tensors(layouts.side_by_side(
                        [grads[i] for i in group])))

        self.forward = recorder.record(forward)
        self.backward = recorder.record(backward) if self._static_given else None

    def _check(self, x: Tensor, maps: list[Tensor], grads: list[Tensor]) -> None:
        """Compare a replay with the eager run."""
        found = self.run(x)
        _compare('output', maps, found)
        if self.backward is not None:
            given = iter([static.clone() for static in self._static_given])
            dx, own = self.gradients([next(given) if wanted else None
                                      for wanted in self.differentiable])
            _compare('gradient', grads, [dx] * self._has_dx + own)


def _compare(what: str, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
    whole = sum(a.square().sum() for a, _ in pairs)
    apart = sum((a - b).square().sum() for a, b in pairs)
    if not pairs or not torch.isfinite(whole):
        return  # a model that has no numbers any more; others look at that
    if not apart <= TOLERANCE ** 2 * whole:
        raise RuntimeError(
            f'the {what} of a replay is not that of an eager run from the same state: the norm of '
            f'the difference is {(apart / whole).sqrt().item():.2g} of its norm, and {TOLERANCE} '
            'is what rounding may do')


class _Call(nn.Module):
    """Calls a function of ``module`` where ``functional_call`` may exchange its parameters."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor):
        return self.function(x)


class _Replay(torch.autograd.Function):
    """A graph as one step of autograd."""

    @staticmethod
    def forward(ctx, graph: _Graph, token: _Token, x: Tensor, *weights: Tensor):
        ctx.graph, ctx.token = graph, token
        ctx.set_materialize_grads(False)
        maps = graph.run(x)
        ctx.mark_non_differentiable(
            *(y for y, wanted in zip(maps, graph.differentiable, strict=True) if not wanted))
        return maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *given: Tensor | None):
        if ctx.token.done:
            raise RuntimeError(
                'the backward pass of a CUDA graph was asked for a second time (retain_graph=True),'
                ' and a graph keeps nothing for it; add the losses up before backward(), or train '
                'without CUDA graphs')
        dx, grads = ctx.graph.gradients(given)
        ctx.token.done = True
        return None, None, dx, *grads


_apply_replay = fast_apply(_Replay)


class _Layouts:
    """How gradients lie in one flat tensor: in the order in which the memory of parameters does.

    Autograd copies a gradient whose strides are not the parameter's.

    Args:
        weights: the parameters.

    Attributes:
        like: tensors with the sizes in that order.
        turned: for the index of each weight with another order of axes, the permutation back.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self.turned: dict[int, tuple[int, ...]] = {}
        self.like, self._orders = [], {}
        for i, weight in enumerate(weights):
            weight = weight.detach()
            order = tuple(sorted(range(weight.dim()), key=lambda axis: -weight.stride(axis)))
            if not weight.is_contiguous() and weight.permute(order).is_contiguous():
                self._orders[i], weight = order, weight.permute(order)
                self.turned[i] = tuple(map(order.index, range(len(order))))
            self.like.append(weight)

    def side_by_side(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients whose memory is to be filled in the order of their axes."""
        return [grad.permute(self._orders[i]) if i in self._orders else grad
                for i, grad in enumerate(grads)]


def _noise(maps: list[Tensor]) -> list[Tensor]:
    """Something to send back: norms have no gradient for what is even."""
    generators = {y.device: torch.Generator(y.device).manual_seed(0) for y in maps}
    return [torch.randn(y.shape, generator=generators[y.device], device=y.device).to(y.dtype)
            for y in maps]


class _Arena:
    """Memory that graphs share for what goes in and out: one of them is in use at a time."""

    def __init__(self):
        self._memory = torch.empty(0, dtype=torch.uint8)

    def carve(self, wanted: Sequence[tuple[Tensor, int | None]], device: torch.device
              ) -> list[Tensor]:
        """Tensors like those given, or flat ones with a number of elements; not initialised."""
        shapes = [(tuple(like.shape), _dense_strides(like)) if number is None else
                  ((number,), (1,)) for like, number in wanted]
        sizes = [-(-torch.Size(shape).numel() * like.element_size() // ALIGNMENT) * ALIGNMENT
                 for (like, _), (shape, _) in zip(wanted, shapes, strict=True)]
        if sum(sizes) > self._memory.numel() or self._memory.device != device:
            self._memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        found, start = [], 0
        for (like, _), (shape, strides), size in zip(wanted, shapes, sizes, strict=True):
            piece = self._memory[start:start + size].view(like.dtype)
            # .data: each counts its own changes, which autograd looks at
            found.append(piece.as_strided(shape, strides, piece.storage_offset()).data)
            start += size
        return found


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    return torch.empty_like(x, device='meta').stride()


# --- what is put back, and what is watched --------------------------------------------------------

class _State:
    """What running a module changes besides its result: buffers and random states."""

    def __init__(self, module: nn.Module):
        self._buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self._random = get_random_state()

    def restore(self) -> None:
        """Put all of it back."""
        for buffer, value in self._buffers:
            buffer.data.copy_(value)  # not a change that an earlier forward pass has to know of
        set_random_state(self._random)


class _Watched:
    """Numbers the states of a module in which its code may do different things."""

    def __init__(self, module: nn.Module):
        self._modules = list(module.modules())
        self._states: dict[tuple, int] = {}
        self._seen: _Seen | None = None  # of the state before
        self._futile = 0  # looks at it that found another object in an equal state

    def state(self) -> int | None:
        """A number, the same for equal states; None if hooks would have to run inside."""
        if self._seen is not None and self._seen.still():
            return self._seen.number
        number = self._number()
        self._futile += self._seen is not None and self._seen.number == number
        known = number not in (None, MANY_STATES) and self._futile < MANY_STATES
        self._seen = _Seen(self._modules, number) if known else None
        return number

    def _number(self) -> int | None:
        state = self._look()
        if state is not None and state not in self._states:
            self._modules = list(self._modules[0].modules())  # one may have been replaced
            state = self._look()
            if len(self._states) < MANY_STATES:
                self._states[state] = len(self._states)
        return None if state is None else self._states.get(state, MANY_STATES)

    def _look(self) -> tuple | None:
        found: list = []
        for module in self._modules:
            values = module.__dict__
            # Those of the outermost module run around the graph.
            if module is not self._modules[0] and (
                    values['_forward_hooks'] or values['_forward_pre_hooks']
                    or values['_backward_hooks'] or values['_backward_pre_hooks']):
                return None
            found += [repr(value) if type(value) is tuple else value
                      for value in values.values() if type(value) in PLAIN]
            for tensors in (values['_parameters'], values['_buffers']):
                found += [None if t is None else (t.data_ptr(), t.dtype, t.requires_grad)
                          for t in tensors.values()]
            # Gradients go to a parameter, not to its memory.
            for parts in (values['_parameters'], values['_modules']):
                found += map(id, parts.values())
        return tuple(found)


class _Seen:
    """A state that was numbered, for a look in few calls whether it is still the same.

    What it compares decides more than a state does: whether each attribute of a module is the very
    object that it was, of whatever kind. So it may take a state for changed that is not.

    Args:
        modules: all of them, the outermost first.
        number: of their state.
    """

    def __init__(self, modules: list[nn.Module], number: int):
        self.number = number
        self._attributes = [vars(module) for module in modules]
        self._parts = [own[name] for own in self._attributes
                       for name in ('_parameters', '_buffers', '_modules')]
        self._hooks = [own[name] for own in self._attributes[1:]
                       for name in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks',
                                    '_backward_pre_hooks')]
        self._values, self._owned = _values_of(self._attributes), _values_of(self._parts)
        self._tensors = [part for part in self._owned if isinstance(part, Tensor)]
        self._places, self._kinds = self._memory()
        # What may change in place could not be seen.
        self._blind = any(type(value) is tuple and not all(type(x) in PLAIN for x in value)
                          for value in self._values)

    def still(self) -> bool:
        """Whether nothing has changed."""
        values, owned = _values_of(self._attributes), _values_of(self._parts)
        return (not self._blind and len(values) == len(self._values)
                and all(map(is_, values, self._values)) and len(owned) == len(self._owned)
                and all(map(is_, owned, self._owned)) and not any(self._hooks)
                and self._memory() == (self._places, self._kinds))

    def _memory(self) -> tuple[list, list]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_KIND, self._tensors))


_KIND = attrgetter('dtype', 'requires_grad')


def _values_of(mappings: list[dict]) -> list:
    return list(chain.from_iterable(map(dict.values, mappings)))


class CudaRecorder:
    """Records what is launched and replays it."""

    def __init__(self):
        self._pool = self._stream = None

    def takes(self, x: Tensor) -> bool:
        """Whether calls with this input may be recorded."""
        return (x.is_cuda and x.device.index == torch.cuda.current_device()
                and not torch.cuda.is_current_stream_capturing())

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Generators that recordings draw from."""
        return [torch.cuda.default_generators[device.index]]

    def host_state(self) -> str:
        """State of the generators whose numbers a recording cannot draw anew."""
        state = get_random_state()
        return repr((state['python'], state['numpy'][1:3], state['torch'].sum(),
                     hash(state['torch'].numpy().tobytes())))

    def new_pool(self) -> None:
        """Let recordings from now on share memory that none before them uses."""
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run on the stream that records."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what ``run`` launches; returns what replays it."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators(torch.device('cuda', torch.cuda.current_device())):
            graph.register_generator_state(generator)  # a replay then goes on where it stands
        # Other threads (NCCL's watchdog, pinning of memory) may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                              capture_error_mode='thread_local'):
            run()
        return graph.replay
