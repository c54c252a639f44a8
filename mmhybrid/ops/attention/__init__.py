"""Attention without mask on a CPU: PyTorch's numbers in less time, for inference in float32.

PyTorch's kernel spends most of its time outside its matrix products, which are narrow: a head of
MambaVision has 40 channels.  The kernel beside this file keeps all of them in registers.
"""
from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..selective_scan import cpp

__all__ = ['attention', 'unsupported_reason']

_SOURCE = Path(__file__).with_name('attention.cpp')


class _View(ctypes.Structure):
    _fields_ = [('data', ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ('batch', 'head', 'token')
    ]


class _Arguments(ctypes.Structure):
    """Mirror of Arguments in attention.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ('batch', 'heads', 'queries', 'keys', 'width',
                                             'threads')]
        + [(name, _View) for name in 'qkv'] + [('out', ctypes.c_void_p)]
    )


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none."""
    try:
        library = cpp.load(cpp.build(_SOURCE))
        library.mmhybrid_attention.argtypes = [ctypes.POINTER(_Arguments)]
        library.mmhybrid_attention.restype = None
        for name in ('arguments', 'lanes'):
            getattr(library, f'mmhybrid_attention_{name}').restype = ctypes.c_int64
    except (cpp.BuildError, OSError, AttributeError) as error:
        return f'the compiled attention kernel is not available: {error}'
    assert library.mmhybrid_attention_arguments() == ctypes.sizeof(_Arguments)
    if library.mmhybrid_attention_lanes() < 8:
        return "this processor's vectors are short, for which PyTorch's kernel is faster"
    return library


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernel does not take queries, keys and values (B, heads, L, D); None when it does.

    It takes float32 on a CPU where D is a multiple of 8 with channels side by side, and leaves all
    calls to PyTorch that somebody differentiates, compiles, traces or counts.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return 'the kernel has no gradients, and a compiler or tracer cannot see into it'
    if not all(type(x) is Tensor and x.device.type == 'cpu' and x.dtype == torch.float32
               and x.numel() and x.stride(-1) == 1 for x in tensors):
        return 'the kernel takes float32 tensors on a CPU that are not empty'
    if tensors[0].shape[-1] % 8:
        return f'the kernel takes heads of a multiple of 8 channels, not {tensors[0].shape[-1]}'
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled('cpu'):
        return 'somebody counts operators, or wants half precision'
    library = _library()
    return library if isinstance(library, str) else None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head.

    Args:
        q: (B, heads, L', D), for which :func:`unsupported_reason` has none, as k and v.
        k: (B, heads, L, D).
        v: like k.

    Returns:
        (B, heads, L', D), a view of contiguous (B, L', heads, D), like that of PyTorch's kernels.
    """
    B, heads, queries, D = q.shape
    out = q.new_empty(B, queries, heads, D)
    views = {name: _View(x.data_ptr(), *x.stride()[:3]) for name, x in zip('qkv', (q, k, v),
                                                                           strict=True)}
    _library().mmhybrid_attention(ctypes.byref(_Arguments(
        batch=B, heads=heads, queries=queries, keys=k.shape[2], width=D,
        threads=torch.get_num_threads(), out=out.data_ptr(), **views)))
    return out.transpose(1, 2)
