"""Channel attention of scan directions, their sum, norm and gate: one function of autograd.

B batch, K directions, D channels, L tokens, E width of the attention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import library, triton_support
from ..precision import autocast_off
from ..selective_scan import launch
from ..selective_scan.launch import Launch, Place, Program
from ..selective_scan.passes import find, processors
from .merge import MOST_CHANNELS, merged, sizes_of, unmerged

__all__ = ['Attention', 'attend_norm']

_MOST_REPEAT = 64


class Attention(NamedTuple):
    """Parameters of the attention: what tokens say of channels, through two linear layers.

    Attributes:
        weight, bias: of the layer norm over D, both (D,).
        reduce, reduce_bias: (E, D) and (E,).
        select, select_bias: (D, E) and (D,).
    """

    weight: Tensor
    bias: Tensor
    reduce: Tensor
    reduce_bias: Tensor
    select: Tensor
    select_bias: Tensor


def attend_norm(
    y: Tensor, attention: Attention, attention_eps: float, weight: Tensor, bias: Tensor, eps: float,
    gate: Tensor, dtype: torch.dtype,
) -> Tensor:
    """norm(sum_k a_k y_k) silu(gate), where a_k are factors of channels, on a GPU with Triton.

    Channel attention of LocalMamba (arXiv 2403.09338), section 3.3::

        a_k = sigmoid(select gelu(reduce mean_l(norm(y_k))))

    All of it is in float32; the results are rounded once.

    Args:
        y: (B, K, D, L), results of K directions in one order of the tokens, any strides.
        attention: in float32.
        attention_eps: added to the variance of each y_k.
        weight: (D,), of the layer norm of the sum.
        bias: (D,).
        eps: added to the variance of the sum.
        gate: (B, L, D), any strides.
        dtype: of the result.

    Returns:
        (B, L, D), contiguous, differentiable once in y, gate and all parameters.

    Raises:
        ValueError: more channels than a tile holds.
        RuntimeError: Triton cannot run here; the message says why.
    """
    reason = triton_support.reason(y.device)
    if reason:
        raise RuntimeError(f'attend_norm needs the Triton kernels, but {reason}.')
    if y.shape[2] > MOST_CHANNELS:
        raise ValueError(
            f'attend_norm takes at most {MOST_CHANNELS} channels, got {y.shape[2]}; build the '
            "model with scan_backend='torch'."
        )
    apply = _apply if launch.eager() else _AttendNorm.apply
    with autocast_off(y.device):
        return apply(y, *attention, weight, bias, gate, attention_eps, eps, dtype)


class _AttendNorm(torch.autograd.Function):
    """Both passes; what is between the kernels acts on B K vectors of D numbers."""

    @staticmethod
    def forward(ctx, y, w, b, reduce, reduce_bias, select, select_bias, weight, bias, gate,
                attention_eps, eps, dtype):
        mean = _call('token_sums', y, None, None, attention_eps).flatten(0, 1)
        normed = torch.addcmul(b, mean, w)
        hidden = F.linear(normed, reduce, reduce_bias)
        active = F.gelu(hidden)
        logit = F.linear(active, select, select_bias).view(y.shape[:3])
        out, total, stats = _call('merge_attended', y, logit, weight, bias, gate, eps, dtype)
        ctx.save_for_backward(y, w, reduce, select, weight, bias, gate, mean, normed, hidden,
                              active, logit, total, stats)
        ctx.eps = attention_eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (y, w, reduce, select, weight, bias, gate, mean, normed, hidden, active, logit, total,
         stats) = ctx.saved_tensors
        dsum, sums, dgate = _call('merge_norm_backward', dout, total, stats, weight, bias, gate)
        dlogit = _call('token_sums', y, dsum, logit, ctx.eps).flatten(0, 1)
        dselect = dlogit.mT @ active
        dhidden = torch.ops.aten.gelu_backward(dlogit @ select, hidden)
        dreduce = dhidden.mT @ normed
        dnormed = dhidden @ reduce
        dmean = (dnormed * w).view(logit.shape)
        dy = _call('direction_gradients', y, dsum, logit, dmean, ctx.eps)
        return (dy, (dnormed * mean).sum(0), dnormed.sum(0), dreduce, dhidden.sum(0), dselect,
                dlogit.sum(0), *sums.unbind(), dgate, None, None, None)


_apply = launch.fast_apply(_AttendNorm)


def _parts(y: Tensor, rows: int) -> tuple[int, int]:
    """Tiles that a program of sums goes through, and programs per image and direction."""
    batch, directions, _, length = y.shape
    tiles = -(-length // rows)
    repeat = batch * directions * tiles // (2 * processors(y.device))
    repeat = min(max(repeat, 1), _MOST_REPEAT)
    return repeat, -(-tiles // repeat)


def _common(y: Tensor, eps: float) -> dict:
    batch, directions, channels, length = y.shape
    sizes = sizes_of(length, batch * length, channels)
    del sizes['total']
    steps = zip('bkdl', y.stride(), strict=True)
    strides = {f'y_s{axis}': step for axis, step in steps}
    return strides | dict(K=directions, eps=eps, share=1 / length) | sizes


class _Sums:
    """The kernel of sums over tokens; its tensors are y, the gradient of the sum, and logits."""

    def __init__(self, tensors, eps: float):
        from . import triton_kernels as kernels

        y, dsum, _ = tensors
        common = _common(y, eps)
        repeat, parts = _parts(y, common['ROWS'])
        batch, directions, channels, _ = y.shape
        self.size = batch, parts, directions, channels
        later = dsum is not None
        places = dict(p_y=Place(0), p_dsum=Place(1) if later else None,
                      p_logit=Place(2) if later else None, p_sums=Place(3))
        grid = (batch * directions * parts,)
        self.program = Program(kernels, [
            Launch('token_sums_kernel', grid, places, common | dict(repeat=repeat, parts=parts))
        ])

    def run(self, tensors, pointers) -> Tensor:
        """The sums, (B, K, D), float32."""
        sums = tensors[0].new_empty(self.size, dtype=torch.float32)
        self.program.run((*tensors, sums), (*pointers, sums.data_ptr()))
        return sums.squeeze(1) if self.size[1] == 1 else sums.sum(1)


class _Gradients:
    """The kernel of dy; its tensors are y, the sum's gradient, logits and the mean's gradient."""

    def __init__(self, tensors, eps: float):
        from . import triton_kernels as kernels

        y = tensors[0]
        common = _common(y, eps)
        batch, directions, channels, length = y.shape
        tiles = -(-length // common['ROWS'])
        self.size = batch, length, directions, channels
        names = ('p_y', 'p_dsum', 'p_logit', 'p_dmean', 'p_dy')
        places = {name: Place(i) for i, name in enumerate(names)}
        grid = (batch * directions * tiles,)
        self.program = Program(kernels, [
            Launch('direction_gradients_kernel', grid, places, common | dict(tiles=tiles))
        ])

    def run(self, tensors, pointers) -> Tensor:
        """The gradient of y."""
        dy = tensors[0].new_empty(self.size)
        self.program.run((*tensors, dy), (*pointers, dy.data_ptr()))
        return dy.permute(0, 2, 3, 1)


_KNOWN: dict[tuple, _Sums | _Gradients] = {}


def forget() -> None:
    """Work every call out again, for tests that change how."""
    _KNOWN.clear()


def _sums(y, dsum, logit, eps):
    one, pointers = find(_KNOWN, (y, dsum, logit), (eps,), lambda: _Sums((y, dsum, logit), eps))
    return one.run((y, dsum, logit), pointers)


def _gradients(*arguments):
    *tensors, eps = arguments
    one, pointers = find(_KNOWN, tensors, (eps,), lambda: _Gradients(tensors, eps))
    return one.run(tensors, pointers)


def _merged(y, logit, weight, bias, gate, eps, dtype):
    return merged((y, weight, bias, gate, logit), eps, dtype)


def _sums_fake(y, dsum, logit, eps):
    return y.new_empty(y.shape[:3], dtype=torch.float32)


def _merged_fake(y, logit, weight, bias, gate, eps, dtype):
    batch, _, channels, length = y.shape
    size = batch, length, channels
    stats = y.new_empty((2, batch * length), dtype=torch.float32)
    return y.new_empty(size, dtype=dtype), y.new_empty(size), stats


def _gradients_fake(y, *_):
    batch, directions, channels, length = y.shape
    return y.new_empty(batch, length, directions, channels).permute(0, 2, 3, 1)


_FUNCTIONS = {
    'token_sums': _sums,
    'merge_attended': _merged,
    'direction_gradients': _gradients,
    'merge_norm_backward': lambda *tensors: unmerged(tensors),
}


def _call(name, *arguments):
    """One of the functions; as an operator where something looks into it."""
    if launch.eager():
        return _FUNCTIONS[name](*arguments)
    return getattr(torch.ops.mmhybrid, name)(*arguments)


# Without derivatives: they are parts of the function above.
library.define(
    'token_sums', '(Tensor y, Tensor? dsum, Tensor? logit, float eps) -> Tensor', _sums, _sums_fake
)
library.define(
    'merge_attended',
    '(Tensor y, Tensor logit, Tensor weight, Tensor bias, Tensor gate, float eps, ScalarType dtype)'
    ' -> (Tensor, Tensor, Tensor)',
    _merged, _merged_fake,
)
library.define(
    'direction_gradients',
    '(Tensor y, Tensor dsum, Tensor logit, Tensor dmean, float eps) -> Tensor',
    _gradients, _gradients_fake,
)
