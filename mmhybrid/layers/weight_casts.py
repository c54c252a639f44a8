"""What autocast casts of a network's weights, in one call instead of one call for each weight.

    casts_weights(forward) -> forward, a decorator of a network's forward function

Under autocast every linear layer and convolution casts its float32 weight and bias when it is
called: two hundred tiny kernels and more in each forward pass, and as many in the backward pass.
Here all of them are cast by one ``torch._foreach_copy_`` before the network runs, into one piece
of memory.  While it runs, ``layer.weight`` gives the copy; ``layer.parameters()``, ``state_dict()``
and everything else that goes through the registered parameters gives the parameter.  Gradients
arrive at the parameters, in float32, as ever.

A module class says of its parameters, or of those of its children, what the type of a layer does
not tell:

- ``reads_itself``: names that it does not, or not only, hand to operations that autocast casts for;
  they stay what they are.  A name of a child stands for all of the child's parameters.
- ``reads_cast``: further names that it hands to such operations only.

Blocks that are recomputed in the backward pass cast their weights one by one there.  Weights of
layers that are not run should be frozen, as those of a backbone's ``unused_parts`` are: hooks on
them would be called for them too, though they get no gradient.
"""
from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .linear import Linear2d, TokenLinear

__all__ = ['casts_weights']

#: Environment variable that leaves casts to autocast when it is 0.
VARIABLE = 'MMHYBRID_CAST_WEIGHTS'
#: Kinds of devices whose autocast this serves.  On a CPU a call costs little.
KINDS = {'cuda'}

_LAYERS = (nn.Linear, TokenLinear, Linear2d, nn.Conv1d, nn.Conv2d, nn.Conv3d,
           nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = frozenset(layer.forward for layer in _LAYERS)
# Classes of PyTorch that leave parameters in pieces until a layer is called.
_SHARDED = {'FullyShardedDataParallel', 'FSDPModule'}
# Elements: copies start at multiples, so that products of matrices may read them in wide words.
_ALIGNMENT = 64
# Elements of the weights whose gradients are cast together: those of DDP's buckets.  What comes
# later in the backward pass does not keep them from being sent.
_TOGETHER = 25 * 2 ** 20 // 4


def casts_weights(forward: Callable) -> Callable:
    """Cast the weights of the module whose forward function this is, once in each call.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    @functools.wraps(forward)
    def with_casts(self, *args, **kwargs):
        kind = _kind()
        if kind is None:
            return forward(self, *args, **kwargs)
        with _weights_of(self) as weights:
            weights.exchange(kind)
            return forward(self, *args, **kwargs)

    return with_casts


def _kind() -> str | None:
    """Kind of device for which weights are to be cast now; None where others look after it."""
    if torch.compiler.is_compiling() or not _wanted():  # a compiler sees all casts
        return None
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return None
    return next((kind for kind in KINDS if torch.is_autocast_enabled(kind)), None)


def _wanted() -> bool:
    wish = os.environ.get(VARIABLE, '1')
    if wish not in ('0', '1'):
        raise ValueError(
            f'{VARIABLE}={wish}, and it may be 1 (cast all weights of a backbone in one call under '
            'autocast, as without it) or 0 (leave each to its layer); set one of them.')
    return wish == '1'


class _Weights:
    """Weights of one module; a context at the end of which they are what they were."""

    def __init__(self, module: nn.Module):
        self._places = [(weakref.ref(m), name) for m, name in _castable(module)]
        self._exchanged: list[tuple[nn.Module, str]] = []
        self._lock = threading.RLock()  # copies of one thread's call are not for another's
        self._depth = 0

    def __enter__(self) -> _Weights:
        self._lock.acquire()
        self._depth += 1
        return self

    def __exit__(self, *_) -> None:
        self._depth -= 1
        try:
            if not self._depth:
                for module, name in self._exchanged:
                    module.__dict__.pop(name, None)
                self._exchanged.clear()
        finally:
            self._lock.release()

    def exchange(self, kind: str) -> None:
        """Let layers find copies in autocast's dtype on devices of a kind."""
        if self._depth > 1:  # a forward function that calls that of its base class
            return
        found: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for ref, name in self._places:
            module = ref()
            p = None if module is None else module._parameters.get(name)
            if p is not None and p.dtype == torch.float32 and p.device.type == kind and p.numel():
                found.setdefault(p, []).append((module, name))
        for p, copy in zip(found, _copies([*found], torch.get_autocast_dtype(kind)), strict=True):
            for module, name in found[p]:
                self._exchanged.append((module, name))
                # Found before the parameter, which nn.Module looks up when there is nothing else.
                module.__dict__[name] = copy


_known: weakref.WeakKeyDictionary[nn.Module, _Weights] = weakref.WeakKeyDictionary()
_knowing = threading.Lock()


def _weights_of(module: nn.Module) -> _Weights:
    with _knowing:
        if module not in _known:
            _known[module] = _Weights(module)
        return _known[module]


def _castable(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of parameters that autocast alone casts, in the order of the network."""
    if any(base.__name__ in _SHARDED for m in module.modules() for base in type(m).__mro__):
        return
    kept = set(_kept(module))
    for child in module.modules():
        names = ('weight', 'bias') if type(child).forward in _FORWARDS else ()
        for name in (*names, *getattr(child, 'reads_cast', ())):
            if child._parameters.get(name) is not None and (child, name) not in kept:
                yield child, name


def _kept(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of parameters that somebody reads as they are."""
    for parent in module.modules():
        yield from _named(parent, getattr(parent, 'reads_itself', ()))


def _named(parent: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of parameters that ``names`` of a module stand for."""
    for name in names:
        path, _, last = name.rpartition('.')
        child = parent.get_submodule(path)
        if last in child._modules:
            child = child._modules[last]
            yield from ((child, own) for own in child._parameters)
        else:
            assert last in child._parameters, f'{type(parent).__name__} has no {name}'
            yield child, last


def _copies(parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of parameters in another dtype, from which gradients flow back to them."""
    with torch.no_grad():
        copies = _cast(parameters, dtype)
    if not torch.is_grad_enabled():
        return copies
    for group in _groups(parameters):
        # Tensors that are not views of anything, so that autograd may call them the results.
        of_group = _Together.apply([copies[i] for i in group], *(parameters[i] for i in group))
        for i, copy in zip(group, of_group, strict=True):
            copies[i] = copy
    return copies


def _groups(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Places of neighbouring parameters that want gradients."""
    group, size = [], 0
    for i, p in enumerate(parameters):
        if not p.requires_grad:
            continue
        if group and (size + p.numel() > _TOGETHER or p.device != parameters[group[0]].device):
            yield group
            group, size = [], 0
        group.append(i)
        size += p.numel()
    if group:
        yield group


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies that lie as the tensors do, made by one call for each device."""
    devices = dict.fromkeys(t.device for t in tensors)
    made: list[Tensor] = [None] * len(tensors)
    for device in devices:
        places = [i for i, t in enumerate(tensors) if t.device == device]
        given = [tensors[i] for i in places]
        new = _room(given, dtype)
        torch._foreach_copy_(new, given)
        for i, copy in zip(places, new, strict=True):
            made[i] = copy
    return made


def _room(like: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised tensors that lie as others do, in one piece of memory."""
    starts, end = [], 0
    for t in like:
        starts.append(end)
        end += -(-t.numel() // _ALIGNMENT) * _ALIGNMENT
    memory = like[0].new_empty(end, dtype=dtype)
    return [memory.as_strided(t.shape, _dense(t), start).detach()
            for t, start in zip(like, starts, strict=True)]


def _dense(t: Tensor) -> tuple[int, ...]:
    return t.stride() if t.is_contiguous() else torch.empty_like(t, device='meta').stride()


class _Together(torch.autograd.Function):
    """Copies in another dtype, whose gradients are cast together."""

    @staticmethod
    def forward(ctx, copies: list[Tensor], *parameters: Tensor):
        ctx.set_materialize_grads(False)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        present = [g for g in grads if g is not None]
        if torch.is_grad_enabled():
            wide = iter([g.float() for g in present])
        else:
            wide = iter(_cast(present, torch.float32))
        return None, *(None if g is None else next(wide) for g in grads)
