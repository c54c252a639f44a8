"""Predicts the peak memory of a training step on a CUDA device from shapes alone.

The step goes through :mod:`.pretended_gpu`, and every tensor's memory is followed from the operator
that makes it until nobody holds it, in blocks of 512 bytes as PyTorch's allocator counts them.
What an operator needs while it runs and gives back, which no tensor shows, is in a table below.
Left out: the CUDA context, what the allocator reserves beyond what is in use, and libraries that
choose a kernel with a larger workspace.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .launches import convolution_turns_layout
from .pretended_gpu import Watcher

__all__ = ['Memory', 'Peak', 'bytes_of']

_BLOCK = 512


def bytes_of(x: Tensor) -> int:
    """Memory of a tensor's storage as the allocator counts it."""
    return _rounded(x.untyped_storage().nbytes())


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@dataclass
class Peak:
    """The moment at which most memory is in use.

    Attributes:
        bytes: in use.
        operator: that runs.
        temporary: bytes of it that only this operator needs.
        parts: bytes by what holds them.
    """

    bytes: int = 0
    operator: str = ''
    temporary: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Memory(Watcher):
    """Follows memory in use; tensors that exist before have to be named by :meth:`hold`.

    Args:
        benchmark: whether ``torch.backends.cudnn.benchmark`` is on. In the first step it tries ways
            to convolve of which the hungriest is taken to write all patches out in float32, which
            fits the one measured training (UperNet with VMamba-T); ``tried`` has that peak.
    """

    def __init__(self, benchmark: bool = False):
        super().__init__()
        self.benchmark = benchmark
        self.tried = Peak()
        self.alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.in_use = 0  # no less than what is: the dead are looked for when it matters
        self.peak = Peak()
        self.kind = 'forward pass'

    def hold(self, tensors, kind: str) -> None:
        """Count tensors that exist."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.device.type == 'cuda':
                self.add(x, kind)

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def seen(self, func, out, args, kwargs) -> None:
        """Count what an operator made, and what it needed."""
        self.hold(out, self.kind)
        rule = _WORKSPACES.get(func._schema.name)
        temporary = rule(out, *args, **kwargs) if rule else 0
        self.peak = self.higher(self.peak, func, temporary)
        if self.benchmark and func._schema.name in _PATCHES:
            temporary += _PATCHES[func._schema.name](out, *args, **kwargs)
            self.tried = self.higher(self.tried, func, temporary)

    def higher(self, peak: Peak, func, temporary: int) -> Peak:
        """The peak until now, or this operator's."""
        if self.in_use + temporary > peak.bytes:
            self.bury()
            if self.in_use + temporary > peak.bytes:
                name = func._schema.name
                return Peak(self.in_use + temporary, name, temporary, self.parts())
        return peak

    def add(self, x: Tensor, kind: str) -> None:
        """Count a tensor's memory, unless it is counted."""
        storage = x.untyped_storage()
        if storage._cdata in self.alive:
            return
        size = _rounded(storage.nbytes())
        self.alive[storage._cdata] = StorageWeakRef(storage), size, kind
        self.in_use += size

    def bury(self) -> None:
        """Forget what nobody holds any more."""
        for key, (reference, size, _) in [*self.alive.items()]:
            if reference.expired():
                del self.alive[key]
                self.in_use -= size

    def parts(self) -> dict[str, int]:
        """Bytes in use by kind."""
        found: dict[str, int] = {}
        for reference, size, kind in self.alive.values():
            if not reference.expired():
                found[kind] = found.get(kind, 0) + size
        return found


# --- what an operator needs beside its results: (output, *arguments) to bytes ---------------------


def _size(x: Tensor) -> int:
    return x.numel() * x.itemsize


def _convolution(out, x, weight, bias, stride, padding, dilation, transposed, output_padding,
                 groups, *_, **__) -> int:
    """Copies with channels last."""
    if not convolution_turns_layout(x, weight, groups):
        return 0
    return _size(x) + _size(weight) + _size(out)


def _convolution_backward(out, dout, x, weight, sizes, stride, padding, dilation, transposed,
                          output_padding, groups, *_, **__) -> int:
    """The gradients are computed one after the other."""
    if not convolution_turns_layout(x, weight, groups):
        return 0
    return _size(x) + _size(weight) + _size(dout)


def _patches(out, x, weight, *_, **__) -> int:
    """What every output of a dense convolution sees, in float32."""
    if weight.shape[1] == 1 or math.prod(weight.shape[2:]) == 1:
        return 0
    return 4 * out.shape[0] * math.prod(out.shape[2:]) * math.prod(weight.shape[1:])


def _flash_backward(out, dout, q, k, v, *_, **__) -> int:
    """Gradients of the queries in float32, and a sum of each row."""
    return 4 * q.numel() + 4 * math.prod(q.shape[:3])


_WORKSPACES: dict[str, Callable[..., int]] = {
    'aten::convolution': _convolution,
    'aten::convolution_backward': _convolution_backward,
    'aten::_scaled_dot_product_flash_attention_backward': _flash_backward,
    'aten::_scaled_dot_product_efficient_attention_backward': _flash_backward,
}
_PATCHES: dict[str, Callable[..., int]] = {
    'aten::convolution': _patches,
    'aten::convolution_backward': lambda out, dout, x, weight, *_, **__: _patches(dout, x, weight),
}
