"""Counts what a training step launches on a CUDA device, and the bytes that its kernels touch.

Nothing runs: the step goes through :mod:`.pretended_gpu` and every operator is seen where PyTorch
dispatches it, casts of autocast included. Views and empty tensors launch nothing; our Triton
kernels count by the launches that they ask for; of PyTorch's operators each launches one kernel
unless a rule below says otherwise. The rules are read off a profile of an H200.

Bytes are those of all tensors that an operator reads and writes, each once, an expanded axis as one
value. What stays in a cache, and what a kernel reads twice, is not known.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .macs import running_modules
from .pretended_gpu import Watcher, backward, pretended_gpu

__all__ = ['LAUNCH_KINDS', 'Launches', 'count_launches']

LAUNCH_KINDS = ('cast', 'copy', 'norm', 'elementwise', 'reduction', 'matmul', 'convolution',
                'attention', 'own', 'fill')


@dataclass
class Launches:
    """What one operator launches in one module.

    Attributes:
        module: the innermost running one; in the backward pass the one whose gradient it is.
        operator: ``aten::add`` and the like; of ours the kernel's name.
        kind: one of ``LAUNCH_KINDS``.
        calls: number of calls.
        launches: kernels launched.
        bytes: read and written.
    """

    module: str
    operator: str
    kind: str
    calls: int = 0
    launches: int = 0
    bytes: int = 0


def count_launches(model: nn.Module, size: Sequence[int], dtype: torch.dtype) -> list[Launches]:
    """Count a training step: forward pass under autocast, a loss of all results, backward pass.

    Args:
        model: on any device; it loses its values and its place.
        size: of the input.
        dtype: of autocast; float32 turns it off.

    Returns:
        One entry for each module and operator that launches, in the order of their first calls.
    """
    counter = _Counter()
    model.train()
    with pretended_gpu(counter.launched):
        model.to_empty(device='cuda')
        x = torch.empty(size, device='cuda')
        with torch.no_grad():  # makes the tables that live as long as the model
            model(x)
        counter.found.clear()
        with running_modules(model, counter.running), counter:
            _step(model, x, dtype, counter.backward)
    return [*counter.found.values()]


def _step(model: nn.Module, x: Tensor, dtype: torch.dtype, entered) -> None:
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        maps = model(x)
    first, *others = (x.float().mean() for x in tree_leaves(maps) if isinstance(x, Tensor))
    backward(sum(others, first), entered)


class _Counter(Watcher):
    """Adds up what every operator launches."""

    def __init__(self):
        super().__init__()
        self.found: dict[tuple[str, str, str], Launches] = {}
        self.running: list[str] = ['']
        self.made: dict[int, str] = {}  # sequence number of a node -> module

    def seen(self, func, out, args, kwargs) -> None:
        """One operator of PyTorch's."""
        if torch.is_grad_enabled():
            self.made.setdefault(torch.autograd._get_sequence_nr() - 1, self.running[-1])
        name = func._schema.name
        if not func.is_view and name not in _FREE:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.add(name, _kind(name, out, args), _launches(name, out, args, kwargs), tensors)

    def launched(self, kernel: str, tensors: list[Tensor]) -> None:
        """Note one of our kernels; pieces of one buffer may overlap."""
        self.add(kernel, 'own', 1, tensors)

    def backward(self, sequence_number: int) -> None:
        """A node of the graph runs next."""
        self.running[-1] = self.made.get(sequence_number, '')

    def add(self, operator: str, kind: str, launches: int, tensors: list[Tensor]) -> None:
        key = self.running[-1], operator, kind
        one = self.found.setdefault(key, Launches(*key))
        one.calls += 1
        one.launches += launches
        one.bytes += _touched(tensors)


def _touched(tensors: list[Tensor]) -> int:
    """Bytes, each tensor once, and no buffer beyond its size."""
    by_storage: dict[int, tuple[int, set]] = {}
    for x in tensors:
        if x.device.type != 'cuda':
            continue
        storage = x.untyped_storage()
        _, views = by_storage.setdefault(storage._cdata, (storage.nbytes(), set()))
        views.add((x.storage_offset(), tuple(x.shape), x.stride(), x.itemsize))
    return sum(min(size, sum(map(_size, views))) for size, views in by_storage.values())


def _size(view: tuple) -> int:
    _, shape, strides, itemsize = view
    return itemsize * math.prod(n for n, step in zip(shape, strides, strict=True) if step or not n)


# --- rules ---------------------------------------------------------------------------------------

# Views that the dispatcher does not call views, and what only allocates or asks.
_FREE = {f'aten::{name}' for name in (
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_unsafe_view',
    'promote_types', 'result_type', 'is_same_size', 'lift_fresh', 'set_', 'resize_', 'detach_',
    '_local_scalar_dense', 'record_stream',
)} | {'mmhybrid::scan_tables'}


def _layer_norm_backward(out, dout, x, shape, *_, **__) -> int:
    """Gradient of the input; of both weights, for many rows in pieces that two sums add up."""
    rows, width = x.numel() // math.prod(shape), math.prod(shape)
    return 2 if rows <= 65536 or width // 32 >= 66 else 4


def _batch_norm(out, x, *_, **__) -> int:
    """Statistics, running statistics, result."""
    return 3


def _batch_norm_backward(out, dout, x, *_, **__) -> int:
    """One kernel on maps, two where channels are last."""
    return 2 if _channels_last(x) else 1


def _convolution(out, x, weight, bias, stride, padding, dilation, transposed, output_padding,
                 groups, *_, **__) -> int:
    """The kernel with what turns layouts around it, copies to a dense layout, and the bias."""
    one_pass, copies = _convolution_pass(x, weight, groups), _dense(x, x, weight, groups)
    if _depthwise(x, weight, groups):
        return one_pass + copies
    return one_pass + copies + (bias is not None)


def _convolution_backward(out, dout, x, weight, sizes, stride, padding, dilation, transposed,
                          output_padding, groups, mask, *_, **__) -> int:
    one_pass = _convolution_pass(x, weight, groups)
    copies = _dense(dout, x, weight, groups) + _dense(x, x, weight, groups)
    return (mask[0] + mask[1]) * one_pass + copies + mask[2]


def _convolution_pass(x: Tensor, weight: Tensor, groups: int) -> int:
    """In 16 bits cuDNN computes with channels last: maps are turned, both factors and result."""
    return 4 if convolution_turns_layout(x, weight, groups) else 1


def convolution_turns_layout(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether maps and weights are copied to channels last for a convolution."""
    return (x.itemsize == 2 and not _depthwise(x, weight, groups)
            and math.prod(weight.shape[2:]) > 1 and not _channels_last(x))


def _depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    return groups == x.shape[1] and weight.shape[1] == 1 and groups > 1


def _dense(x: Tensor, like: Tensor, weight: Tensor, groups: int) -> int:
    """Whether it is copied before a convolution reads it."""
    last = _channels_last(like) or _channels_last(weight)
    if last and not _depthwise(like, weight, groups):
        return int(not _is_channels_last(x))
    return int(not x.is_contiguous())


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def _channels_last(x: Tensor) -> bool:
    """Whether channels are last and not first as well, as for 1 x 1 maps."""
    return _is_channels_last(x) and not x.is_contiguous()


def _foreach(out, tensors, *_, **__) -> int:
    """Up to 64 tensors, and 320 blocks of 65536 values, in one kernel."""
    blocks = sum(-(-x.numel() // 65536) for x in tensors)
    return max(-(-len(tensors) // 64), -(-blocks // 320))


def _always(launches: int):
    return lambda *_, **__: launches


_RULES = {
    'aten::native_layer_norm_backward': _layer_norm_backward,
    'aten::_fused_rms_norm_backward': _layer_norm_backward,
    'aten::native_batch_norm': _batch_norm,
    'aten::native_batch_norm_backward': _batch_norm_backward,
    'aten::native_group_norm': _always(3),
    'aten::native_group_norm_backward': _always(3),
    'aten::convolution': _convolution,
    'aten::convolution_backward': _convolution_backward,
    # rows of gradients, dq dk dv, dq rounded
    'aten::_scaled_dot_product_flash_attention_backward': _always(3),
    'aten::_scaled_dot_product_efficient_attention_backward': _always(2),
    'aten::constant_pad_nd': _always(2),  # fill, copy
    'aten::slice_backward': _always(2),
    'aten::select_backward': _always(2),
    'aten::index_put_': _always(2),
    'aten::_index_put_impl_': _always(2),
}


def _launches(name: str, out, args, kwargs) -> int:
    if name.startswith('aten::_foreach_'):
        return _foreach(out, *args, **kwargs)
    rule = _RULES.get(name)
    return rule(out, *args, **kwargs) if rule else 1


_KIND_OF = {
    'cast': ('_to_copy',),
    'copy': ('clone', 'copy_', 'cat', 'stack', 'constant_pad_nd', 'slice_backward', 'copy',
             'select_backward', 'index', 'index_select', 'gather', 'flip', 'roll', 'repeat',
             '_foreach_copy_', 'index_put_', '_index_put_impl_', 'index_put', 'scatter',
             'split_with_sizes_copy'),
    'norm': ('native_layer_norm', 'native_layer_norm_backward', 'native_batch_norm',
             'native_batch_norm_backward', 'cudnn_batch_norm', 'cudnn_batch_norm_backward',
             'native_group_norm', 'native_group_norm_backward', '_fused_rms_norm',
             '_fused_rms_norm_backward'),
    'reduction': ('sum', 'mean', 'amax', 'var_mean', 'linalg_vector_norm', 'cumsum'),
    'matmul': ('mm', 'bmm', 'addmm', 'baddbmm', 'addmm_', 'matmul', 'linear', 'dot', 'mv'),
    'convolution': ('convolution', 'convolution_backward'),
    'attention': tuple(f'_scaled_dot_product_{kernel}_attention{part}'
                       for kernel in ('flash', 'efficient') for part in ('', '_backward')),
    'fill': ('zeros', 'ones', 'full', 'fill_', 'zero_', 'zeros_like', 'ones_like', 'full_like',
             'new_zeros', 'new_ones', 'new_full', 'arange'),
}
_KINDS = {f'aten::{name}': kind for kind, names in _KIND_OF.items() for name in names}


def _kind(name: str, out, args) -> str:
    if name == 'aten::_to_copy' and out.dtype == args[0].dtype:
        return 'copy'
    return _KINDS.get(name, 'elementwise')
