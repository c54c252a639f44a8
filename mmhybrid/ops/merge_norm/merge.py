"""Sum of scan directions, norm and gate: its calls, passes and PyTorch operators.

B batch, K directions, D channels, L tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import library, triton_support
from ..precision import autocast_off
from ..selective_scan import launch
from ..selective_scan.launch import Launch, Place, Program
from ..selective_scan.passes import find, processors, remember

__all__ = ['merge_norm', 'merge_norm_reference']

# Elements of a tile, and channels above which a token is too much for a tile.
_TILE, MOST_CHANNELS = 2048, 8192
# Tokens of the programs that keep sums over them.
_MOST_REPEAT = 64


def merge_norm(
    y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(sum_k y_k) silu(gate): what follows the scan of a map, on a GPU with Triton.

    The sum and the norm are in float32 and rounded once, at the end. For the gradient the sum is
    kept in the dtype of y.

    Args:
        y: (B, K, D, L), results of K directions in one order of the tokens, any strides.
        weight: (D,), of the layer norm over D.
        bias: (D,).
        eps: added to the variance.
        gate: (B, L, D), any strides.
        dtype: of the result; None for that of y.

    Returns:
        (B, L, D), contiguous, differentiable once in y, weight, bias and gate.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: Triton cannot run here; the message says why.
    """
    tensors = (y, weight, bias, gate)
    dtype = dtype or y.dtype
    ready = launch.prepared(_CALLS, tensors, eps, dtype)
    if ready is not None and ready.call is not None:  # has passed all of the below
        return ready.call(tensors, ready.pointers)

    reason = triton_support.reason(y.device)
    if reason:
        raise RuntimeError(f'merge_norm needs the Triton kernels, but {reason}.')
    _check(*tensors)
    if ready is None or y.numel() == 0:
        return torch.ops.mmhybrid.merge_norm(*tensors, eps, dtype)[0]
    call = _Call(tensors, eps, dtype)
    remember(_CALLS, ready.key, call)
    return call(tensors, ready.pointers)


def merge_norm_reference(
    y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same in PyTorch, on any device."""
    wide = torch.promote_types(torch.promote_types(y.dtype, weight.dtype), torch.float32)
    with autocast_off(y.device):
        total = y.squeeze(1).to(wide) if y.shape[1] == 1 else y.sum(1, dtype=wide)
        x = F.layer_norm(total.mT, weight.shape, weight.to(wide), bias.to(wide), eps)
    x = x.to(dtype or y.dtype)
    return x if gate is None else x * F.silu(gate)


def _check(y, weight, bias, gate) -> None:
    batch, _, channels, length = y.shape if y.dim() == 4 else (0,) * 4
    fits = (
        y.dim() == 4 and y.shape[1] > 0 and weight.shape == bias.shape == (channels,)
        and (gate is None or gate.shape == (batch, length, channels))
    )
    if not fits:
        shapes = [None if x is None else tuple(x.shape) for x in (y, weight, bias, gate)]
        raise ValueError(
            'merge_norm expects y (B, K, D, L), weight and bias (D,), gate (B, L, D) or None, got '
            f'{shapes[0]}, {shapes[1]}, {shapes[2]} and {shapes[3]}.'
        )
    if channels > MOST_CHANNELS:
        raise ValueError(
            f'merge_norm takes at most {MOST_CHANNELS} channels, got {channels}; build the model '
            "with scan_backend='torch'."
        )


def sizes_of(length: int, total: int, channels: int) -> dict[str, int]:
    """Arguments of kernels whose tiles are some tokens by all channels."""
    columns = 1 << max(channels - 1, 15).bit_length()
    rows = max(_TILE // columns, 1)
    return dict(length=length, total=total, channels=channels, ROWS=rows, COLS=columns,
                num_warps=4 if columns <= 2 * _TILE else 8)


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Of a (B, L, D)."""
    steps = (0,) * 3 if x is None else x.stride()
    return {f'{name}_s{axis}': step for axis, step in zip('bld', steps, strict=True)}


class Forward:
    """One kind of forward pass; its tensors are y, weight, bias, gate and logit."""

    def __init__(self, tensors, eps: float, dtype: torch.dtype, gradients: bool):
        from . import triton_kernels as kernels

        y, _, _, gate, logit = tensors
        batch, directions, channels, length = y.shape
        self.size, self.dtype, self.gradients = (batch, length, channels), dtype, gradients
        self.stats = 2, batch * length
        sizes = sizes_of(length, batch * length, channels)
        places = dict(
            p_y=Place(0), p_weight=Place(1), p_bias=Place(2),
            p_gate=None if gate is None else Place(3),
            p_logit=None if logit is None else Place(4), p_out=Place(5),
            p_sum=Place(6) if gradients else None, p_stats=Place(7) if gradients else None,
        )
        steps = zip('bkdl', y.stride(), strict=True)
        constants = {f'y_s{axis}': step for axis, step in steps} | _strides('gate', gate)
        constants |= dict(eps=eps, K=directions) | sizes
        grid = (-(-batch * length // sizes['ROWS']),)
        self.program = Program(kernels, [Launch('merge_norm_kernel', grid, places, constants)])

    def run(self, tensors, pointers) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output; for the gradient the sum, and mean and inverse deviation of every token."""
        y = tensors[0]
        out = y.new_empty(self.size, dtype=self.dtype)
        total = stats = None
        if self.gradients:
            total, stats = y.new_empty(self.size), y.new_empty(self.stats, dtype=torch.float32)
        mine = [x if x is None else x.data_ptr() for x in (out, total, stats)]
        self.program.run((*tensors, out, total, stats), (*pointers, *mine))
        return out, total, stats


class Backward:
    """One kind of backward pass.

    Its tensors are the gradient of the output, the sum and statistics of the forward pass, weight,
    bias and gate.
    """

    def __init__(self, tensors):
        from . import triton_kernels as kernels

        dout, total, _, _, _, gate = tensors
        batch, length, channels = total.shape
        sizes = sizes_of(length, batch * length, channels)
        tiles = -(-batch * length // sizes['ROWS'])
        # two programs for every multiprocessor, where there is that much to do
        repeat = min(max(tiles // (2 * processors(total.device)), 1), _MOST_REPEAT)
        programs = -(-tiles // repeat)
        self.sums = 2, programs, channels
        gated = None if gate is None else Place(5)
        places = dict(
            p_dout=Place(0), p_sum=Place(1), p_stats=Place(2), p_weight=Place(3), p_bias=Place(4),
            p_gate=gated, p_dsum=Place(6), p_dgate=None if gate is None else Place(7),
            p_dparameters=Place(8),
        )
        constants = _strides('dout', dout) | _strides('gate', gate) | sizes
        constants |= dict(repeat=repeat, programs=programs)
        launch_ = Launch('merge_norm_backward_kernel', (programs,), places, constants)
        self.program = Program(kernels, [launch_])

    def run(self, tensors, pointers) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of the sum (B, L, D), of weight and bias (2, D) in float32, and of the gate."""
        total, gate = tensors[1], tensors[5]
        dsum = total.new_empty(total.shape)
        dgate = None if gate is None else gate.new_empty(gate.shape)
        sums = total.new_empty(self.sums, dtype=torch.float32)
        mine = [x if x is None else x.data_ptr() for x in (dsum, dgate, sums)]
        self.program.run((*tensors, dsum, dgate, sums), (*pointers, *mine))
        return dsum, sums.sum(1), dgate


_CALLS: dict[tuple, '_Call'] = {}
_FORWARD: dict[tuple, Forward] = {}
_BACKWARD: dict[tuple, Backward] = {}


def forget() -> None:
    """Work every call out again, for tests that change how."""
    for known in (_CALLS, _FORWARD, _BACKWARD):
        known.clear()


class _Call:
    """One kind of call: its forward pass, and its backward passes by what reaches them."""

    def __init__(self, tensors, eps, dtype):
        self.gradients = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in tensors
        )
        self.forward = Forward((*tensors, None), eps, dtype, self.gradients)
        self.directions = tensors[0].shape[1]
        self.dtypes = [x.dtype for x in tensors[1:3]]
        self.backward: dict[tuple, Backward] = {}

    def __call__(self, tensors, pointers) -> Tensor:
        """The output."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        return self.forward.run((*tensors, None), (*pointers, None))[0]


class _MergeNorm(torch.autograd.Function):
    """Sum, norm and gate where nothing looks into it."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        out, total, stats = call.forward.run((*tensors, None), (*pointers, None))
        ctx.save_for_backward(total, stats, *tensors[1:])
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, dout):
        call, tensors = ctx.call, (dout, *ctx.saved_tensors)
        watched = torch.is_grad_enabled() or launch.intercepted()
        found = None if watched else launch.describe(tensors)
        if found is None:  # the operator says no to a second derivative
            dsum, sums, dgate = torch.ops.mmhybrid.merge_norm_backward(*tensors)
            dgate = None if tensors[5] is None else dgate
        else:
            pointers, description = found
            key = tuple(description)
            one = call.backward.get(key)
            if one is None:
                one = Backward(tensors)
                remember(call.backward, key, one)
            dsum, sums, dgate = one.run(tensors, pointers)
        return None, None, *_gradients(dsum, sums, dgate, call.directions, call.dtypes)


_apply = launch.fast_apply(_MergeNorm)


def _gradients(dsum, sums, dgate, directions, dtypes):
    """Gradients of y, weight, bias and gate; every direction has that of the sum."""
    dweight, dbias = sums.unbind(0)
    dy = dsum.mT.unsqueeze(1).expand(-1, directions, -1, -1)
    return dy, dweight.to(dtypes[0]), dbias.to(dtypes[1]), dgate


# The operators, where something looks into it.


def _forward(*arguments):
    *tensors, eps, dtype = arguments
    if tensors[0].numel() == 0:
        return _forward_fake(*arguments)
    return merged((*tensors, None), eps, dtype)


def merged(tensors, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the sum, and mean and inverse deviation of every token.

    The tensors are y, weight, bias, gate and the logits (B, K, D) of factors of y, or None.
    """
    one, pointers = find(
        _FORWARD, tensors, (eps, dtype), lambda: Forward(tensors, eps, dtype, True)
    )
    return one.run(tensors, pointers)


def _backward(*tensors):
    if tensors[1].numel() == 0:
        return tuple(x.zero_() for x in _backward_fake(*tensors))
    dsum, sums, dgate = unmerged(tensors)
    return dsum, sums, dsum.new_empty(0) if dgate is None else dgate


def unmerged(tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`Backward`."""
    one, pointers = find(_BACKWARD, tensors, (), lambda: Backward(tensors))
    return one.run(tensors, pointers)


def _forward_fake(y, weight, bias, gate, eps, dtype):
    batch, _, channels, length = y.shape
    size = batch, length, channels
    stats = y.new_empty((2, batch * length), dtype=torch.float32)
    return y.new_empty(size, dtype=dtype), y.new_empty(size), stats


def _backward_fake(dout, total, stats, weight, bias, gate):
    return (total.new_empty(total.shape), stats.new_empty((2, weight.shape[0])),
            total.new_empty(0) if gate is None else gate.new_empty(gate.shape))


def _setup_context(ctx, inputs, output):
    y, weight, bias, gate, _, _ = inputs
    ctx.save_for_backward(*output[1:], weight, bias, gate)
    ctx.mark_non_differentiable(*output[1:])
    ctx.directions = y.shape[1]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, *_):
    if dout is None:
        return (None,) * 6
    tensors = ctx.saved_tensors
    dsum, sums, dgate = torch.ops.mmhybrid.merge_norm_backward(dout, *tensors)
    dgate = None if tensors[4] is None else dgate
    dtypes = [x.dtype for x in tensors[2:4]]
    return *_gradients(dsum, sums, dgate, ctx.directions, dtypes), None, None


library.register(
    'merge_norm',
    schema=(
        '(Tensor y, Tensor weight, Tensor bias, Tensor? gate, float eps, ScalarType dtype) -> '
        '(Tensor, Tensor, Tensor)'
    ),
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        '(Tensor dout, Tensor total, Tensor stats, Tensor weight, Tensor bias, Tensor? gate) -> '
        '(Tensor, Tensor, Tensor)'
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'merge_norm has a first derivative only, and a second one was asked for '
        "(create_graph=True); build the model with scan_backend='reference'."
    ),
)
