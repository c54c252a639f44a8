"""The turned sum on Triton's kernels: calls, passes and PyTorch operators.

B samples, L tokens of each, C channels.
"""

import functools

import torch
from torch import Tensor

from .. import library, triton_support
from ..selective_scan import launch
from ..selective_scan.launch import Launch, Place, Program
from ..selective_scan.passes import find, remember

__all__ = ['rotated_sum', 'unsupported_reason']

# Tokens and channels of a tile.
_ROWS, _COLS = 16, 64
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def unsupported_reason(stream: Tensor | None, hidden: Tensor, cos: Tensor) -> str | None:
    """Why the kernels do not take these tensors; None when they do."""
    if hidden.is_meta:
        return 'a meta tensor has no memory'
    reason = triton_support.reason(hidden.device)
    if reason:
        return reason
    for x in (stream, hidden, cos):
        if x is not None and x.dtype not in _DTYPES:
            return f'its kernels take float32, bfloat16 and float16, and a tensor is {x.dtype}'
    return None if hidden.numel() else 'there is no token'


def rotated_sum(
    stream: Tensor | None, hidden: Tensor, factor: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    """stream + factor * hidden, with every pair of neighbouring channels turned.

    The pair (a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b). Nothing is checked but what
    :func:`unsupported_reason` says.

    Args:
        stream: (B, L, C) with an even C, or None for zero.
        hidden: (B, L, C).
        factor: one number for each sample, (B,), float32, or None for one; it gets no gradient.
        cos: (L, C); it gets no gradient.
        sin: likewise.

    Returns:
        (B, L, C) in the dtype to which PyTorch promotes the parts. Differentiable once.
    """
    tensors = (stream, hidden, factor, cos, sin)
    # Both are contiguous in a network.
    tensors = tuple(x if x is None or x.is_contiguous() else x.contiguous() for x in tensors)
    ready = launch.prepared(_CALLS, tensors)
    if ready is None:
        return torch.ops.mmhybrid.rotated_sum(*tensors)
    call = ready.call
    if call is None:
        call = _Call(tensors)
        remember(_CALLS, ready.key, call)
    return call(tensors, ready.pointers)


def _dtype_of(stream, hidden, cos) -> torch.dtype:
    parts = (x.dtype for x in (stream, hidden, cos) if x is not None)
    return functools.reduce(torch.promote_types, parts)


def _constants(stream, hidden, factor) -> tuple[tuple[int], dict]:
    """Grid and arguments of a kernel."""
    batch, length, channels = hidden.shape
    blocks = -(-channels // _COLS)
    return (-(-batch * length // _ROWS) * blocks,), dict(
        tokens=batch * length, length=length, channels=channels, blocks=blocks,
        HAS_STREAM=stream is not None, HAS_FACTOR=factor is not None, ROWS=_ROWS, COLS=_COLS,
        num_warps=4,
    )


def _place(x, i: int) -> Place | None:
    return None if x is None else Place(i)


class Forward:
    """One kind of forward pass; its tensors are stream, hidden, factor, cos and sin."""

    def __init__(self, tensors):
        from . import triton_kernels as kernels

        stream, hidden, factor, cos, _ = tensors
        self.dtype = _dtype_of(stream, hidden, cos)
        places = dict(
            p_stream=_place(stream, 0), p_hidden=Place(1), p_factor=_place(factor, 2),
            p_cos=Place(3), p_sin=Place(4), p_out=Place(5),
        )
        grid, constants = _constants(stream, hidden, factor)
        self.program = Program(kernels, [Launch('rotated_sum_kernel', grid, places, constants)])

    def run(self, tensors, pointers) -> Tensor:
        """The output."""
        out = tensors[1].new_empty(tensors[1].shape, dtype=self.dtype)
        self.program.run((*tensors, out), (*pointers, out.data_ptr()))
        return out


class Backward:
    """One kind of backward pass; its tensors are the gradient, factor, cos and sin.

    Args:
        tensors: as above.
        dtypes: of stream (None without one) and hidden.
    """

    def __init__(self, tensors, dtypes):
        from . import triton_kernels as kernels

        dout, factor, _, _ = tensors
        self.dtypes = dtypes
        places = dict(
            p_dout=Place(0), p_factor=_place(factor, 1), p_cos=Place(2), p_sin=Place(3),
            p_dstream=_place(dtypes[0], 4), p_dhidden=Place(5),
        )
        grid, constants = _constants(dtypes[0], dout, factor)
        launches = [Launch('rotated_sum_backward_kernel', grid, places, constants)]
        self.program = Program(kernels, launches)

    def run(self, tensors, pointers) -> tuple[Tensor | None, Tensor]:
        """Gradients of stream and hidden."""
        shape = tensors[0].shape
        grads = [None if d is None else tensors[0].new_empty(shape, dtype=d) for d in self.dtypes]
        addresses = (None if x is None else x.data_ptr() for x in grads)
        self.program.run((*tensors, *grads), (*pointers, *addresses))
        return tuple(grads)


_CALLS: dict[tuple, '_Call'] = {}
_FORWARD: dict[tuple, Forward] = {}
_BACKWARD: dict[tuple, Backward] = {}


def forget() -> None:
    """Work every call out again, for tests that change how."""
    for known in (_CALLS, _FORWARD, _BACKWARD):
        known.clear()


class _Call:
    """One kind of call: its forward pass, and its backward passes by what reaches them."""

    def __init__(self, tensors):
        stream, hidden, *_ = tensors
        self.forward = Forward(tensors)
        self.dtypes = None if stream is None else stream.dtype, hidden.dtype
        self.backward: dict[tuple, Backward] = {}
        self.gradients = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (stream, hidden)
        )

    def __call__(self, tensors, pointers) -> Tensor:
        """The output."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        return self.forward.run(tensors, pointers)


class _RotatedSum(torch.autograd.Function):
    """The sum where nothing looks into it."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        ctx.save_for_backward(*tensors[2:])
        ctx.call = call
        return call.forward.run(tensors, pointers)

    @staticmethod
    def backward(ctx, dout):
        call = ctx.call
        tensors = (dout.contiguous(), *(
            x if x is None else x.contiguous() for x in ctx.saved_tensors
        ))
        watched = torch.is_grad_enabled() or launch.intercepted()
        found = None if watched else launch.describe(tensors)
        if found is None:  # the operator says no to a second derivative
            return None, None, *_backward_operator(tensors, call.dtypes), None, None, None
        pointers, description = found
        key = tuple(description)
        one = call.backward.get(key)
        if one is None:
            one = Backward(tensors, call.dtypes)
            remember(call.backward, key, one)
        return None, None, *one.run(tensors, pointers), None, None, None


_apply = launch.fast_apply(_RotatedSum)


# The operators, where something looks into the sum.


def _backward_operator(tensors, dtypes):
    has_stream = dtypes[0] is not None
    dstream, dhidden = torch.ops.mmhybrid.rotated_sum_backward(
        *tensors, dtypes[0] if has_stream else dtypes[1], dtypes[1], has_stream
    )
    return (dstream if has_stream else None), dhidden


def _forward(*tensors):
    one, pointers = find(_FORWARD, tensors, (), lambda: Forward(tensors))
    return one.run(tensors, pointers)


def _backward(dout, factor, cos, sin, stream_dtype, hidden_dtype, has_stream):
    tensors = (dout.contiguous(), factor, cos, sin)
    dtypes = (stream_dtype if has_stream else None), hidden_dtype
    one, pointers = find(_BACKWARD, tensors, dtypes, lambda: Backward(tensors, dtypes))
    dstream, dhidden = one.run(tensors, pointers)
    return (dout.new_empty(0, dtype=stream_dtype) if dstream is None else dstream), dhidden


def _forward_fake(stream, hidden, factor, cos, sin):
    return hidden.new_empty(hidden.shape, dtype=_dtype_of(stream, hidden, cos))


def _backward_fake(dout, factor, cos, sin, stream_dtype, hidden_dtype, has_stream):
    dstream = dout.new_empty(dout.shape if has_stream else (0,), dtype=stream_dtype)
    return dstream, dout.new_empty(dout.shape, dtype=hidden_dtype)


def _setup_context(ctx, inputs, output):
    stream, hidden, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.dtypes = None if stream is None else stream.dtype, hidden.dtype


def _differentiate(ctx, dout):
    grads = _backward_operator((dout, *ctx.saved_tensors), ctx.dtypes)
    return (*grads, None, None, None)


library.register(
    'rotated_sum',
    schema='(Tensor? stream, Tensor hidden, Tensor? factor, Tensor cos, Tensor sin) -> Tensor',
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        '(Tensor dout, Tensor? factor, Tensor cos, Tensor sin, ScalarType stream_dtype, '
        'ScalarType hidden_dtype, bool has_stream) -> (Tensor, Tensor)'
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'the turned sum has a first derivative only, and a second one was asked for '
        "(create_graph=True); build the model with rope=False, or run it where Triton's kernels do "
        'not, as on a CPU.'
    ),
)
