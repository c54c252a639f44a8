"""The fused MambaVision mixer: its calls and PyTorch operators.

B batch, L tokens, C channels, E = C / 2, N state, R rank of the step, K taps, M = B L. Everything
lies token-major. Importing this file needs no Triton; the kernels are imported when first used.
"""

import contextlib
import os

import torch
from torch import Tensor

from .. import library, triton_support
from ..selective_scan import BACKEND_VARIABLE, launch
from ..selective_scan import triton_backend as scan
from ..selective_scan.launch import Prepared
from ..selective_scan.passes import find, remember
from .passes import Backward, Forward, Weights, shape_of

__all__ = ['fused_mixer', 'mix', 'prepared', 'unsupported_reason']


def unsupported_reason(device: torch.device, dtype: torch.dtype, state: int) -> str | None:
    """Why the kernels do not take a mixer on this device, in this dtype, with N states.

    Args:
        device: where the tokens are.
        dtype: of the tokens, after autocast.
        state: N.
    """
    if device.type == 'cpu' and not triton_support.interpreting():
        return (
            'its Triton kernels run on a GPU and the tensors are on the CPU; move the model and '
            "its input to a GPU, or use fused='auto'"
        )
    reason = triton_support.reason(device)
    if reason:
        return reason
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'its kernels take float32, bfloat16 and float16 and the tokens are {dtype}'
    if state > scan.MAX_STATE:
        return f'its kernels hold at most {scan.MAX_STATE} states and this mixer has {state}'
    return None


# Places among x and the weights: factors of matrix products, what kernels read, and D.
_FACTORS, _READ, _D = (0, 1, 4, 5, 9), (2, 3, 6, 7, 8), 8
_DENSE = frozenset({0, *_READ})

_CALLS: dict[tuple, '_Call'] = {}
_FORWARD: dict[tuple, Forward] = {}
_BACKWARD: dict[tuple, Backward] = {}


def prepared(tensors: tuple[Tensor, ...], lean: bool, backend: str, *flags) -> Prepared | None:
    """Describe a call of :func:`mix`; None where the registered operator must take it.

    Args:
        tensors: x and the weights as :func:`fused_mixer` takes them.
        lean: see there.
        backend: the scan that was asked for.
        flags: everything else that decides whether the call may be taken.
    """
    x = tensors[0]
    if torch.compiler.is_compiling() or x.is_meta:  # the meta device knows no autocast
        return None
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    wish = os.environ.get(BACKEND_VARIABLE) if backend == 'auto' else backend
    return launch.prepared(_CALLS, tensors, autocast, lean, wish, *flags)


def mix(tensors: tuple[Tensor, ...], lean: bool, ready: Prepared | None) -> Tensor:
    """:func:`fused_mixer` of tensors that :func:`prepared` has described, None if it declined."""
    if ready is None:
        return _through_operator(*tensors, lean)
    call = ready.call
    if call is None:
        call = _Call(tensors, lean)
        remember(_CALLS, ready.key, call)
    return call(tensors, ready.pointers)


class _Call:
    """One kind of call: its forward pass, and its backward passes by what reaches them."""

    def __init__(self, tensors: tuple[Tensor, ...], lean: bool):
        self.gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # Without a backward pass nothing is kept.
        self.lean = lean or not self.gradients
        self.kind = kind = tensors[0].device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.dtype = half or tensors[0].dtype
        # As autocast casts for F.linear; a kernel reads D in float32, and all else as it is.
        dtypes = dict.fromkeys(_FACTORS if half else (), half) | {_D: torch.float32}
        self.changes = [
            (i, dtypes.get(i, x.dtype), i in _DENSE) for i, x in enumerate(tensors)
            if dtypes.get(i, x.dtype) != x.dtype or (i in _DENSE and not x.is_contiguous())
        ]
        self.forward: Forward | None = None
        self.backward: dict[tuple, Backward] = {}

    def __call__(self, tensors: tuple[Tensor, ...], pointers: list[int | None]) -> Tensor:
        """The output."""
        if not self.gradients:
            return self.run(tensors, pointers)[0]
        if self.changes and self.changes[0][0] == 0:
            # Where autograd sees it: it keeps the changed x, and asks it for a second derivative.
            tensors = (tensors[0].to(self.dtype).contiguous(), *tensors[1:])
        return _apply(self, pointers, *tensors)

    def changed(self, tensors, pointers) -> tuple[tuple[Tensor, ...], list[int | None]]:
        """x and the weights as the passes take them; addresses where they matter."""
        tensors, pointers = [*tensors], [*pointers]
        for i, dtype, dense in self.changes:
            x = tensors[i].to(dtype)
            if dense:
                x = x.contiguous()
                pointers[i] = x.data_ptr()
            tensors[i] = x
        return tuple(tensors), pointers

    def run(self, tensors, pointers) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The output, and what is kept: x and the weights as they were taken, and the rest."""
        if self.changes:
            tensors, pointers = self.changed(tensors, pointers)
        weights = Weights(*tensors[1:])
        if self.forward is None:
            self.forward = Forward(tensors[0], weights, self.lean)
        pointers = [pointers[i] for i in _READ]
        out, *kept = self.forward.run(tensors[0], weights, pointers)
        return out, (*tensors, *kept)

    def run_backward(self, key: tuple, pointers, dout, x, weights: Weights, kept):
        """Gradients of x and of the weights."""
        one = self.backward.get(key)
        if one is None:
            one = Backward(x, weights, kept[1:], self.lean)
            remember(self.backward, key, one)
        if torch.is_autocast_enabled(self.kind) and (
            torch.get_autocast_dtype(self.kind) != self.dtype
        ):
            with torch.autocast(self.kind, enabled=False):
                return one.run(dout, x, *kept, weights, pointers)
        return one.run(dout, x, *kept, weights, pointers)


class _Mixer(torch.autograd.Function):
    """The mixer where nothing looks into it."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        out, kept = call.run(tensors, pointers)
        ctx.save_for_backward(*kept)
        ctx.call = call
        # Changed weights have left the graph, and a second derivative must find it.
        ctx.weights = tensors[1:] if call.changes else None
        return out

    @staticmethod
    def backward(ctx, dout):
        call = ctx.call
        x, *weights, yz, xz, x_dbl, states = ctx.saved_tensors
        weights = Weights(*weights)
        seen = (dout, *weights.read, xz, x_dbl, states)
        found = None if torch.is_grad_enabled() or launch.intercepted() else launch.describe(seen)
        if found is None:
            if ctx.weights is not None:
                (_, *weights), _ = call.changed((x, *ctx.weights), (None,) * 10)
            kept = yz, xz, x_dbl, states
            return None, None, *_backward_operator(dout, x, *kept, [*weights], call.lean)
        pointers, (_, *description) = found
        dx, dw_in, dw_conv, *rest = call.run_backward(
            tuple(description), pointers[1:6], dout, x, weights, (yz, xz, x_dbl, states)
        )
        # Autograd gives each the dtype of its tensor.
        return None, None, dx, dw_in, *dw_conv.unbind(), *rest


_apply = launch.fast_apply(_Mixer)


def forget() -> None:
    """Work every call out again, for tests that change how."""
    for known in (_CALLS, _FORWARD, _BACKWARD):
        known.clear()
    scan.forget()


def _without_autocast(x: Tensor):
    """Autocast off; meta tensors, with which tests look at launches, know none."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# The operators, where something looks into the mixer. Filters are (E, K), states (B, NC, N, E), and
# the gradients of both filters are one (C, K).


def _forward(x: Tensor, *arguments):
    """The forward pass: the output, and what the backward pass needs beside x."""
    *weights, lean = arguments
    weights = Weights(*weights)
    weights = weights._replace(D=weights.D.float())
    with _without_autocast(x):
        one, pointers = find(
            _FORWARD, (*weights.read, x, *weights), (lean,), lambda: Forward(x, weights, lean)
        )
        out, yz, xz, x_dbl, states = one.run(x, weights, pointers[:5])
    if lean:
        return out, yz, *(x.new_empty(0) for _ in range(3))
    return out, yz, xz, x_dbl, _as_states(states, x, weights)


def _as_states(states: Tensor, x: Tensor, weights: Weights) -> Tensor:
    shape = shape_of(x, weights)
    size = shape.batch, shape.n_kept, weights.sizes[1], weights.sizes[0]
    return states.flatten()[: torch.Size(size).numel()].view(size)


def _backward(dout: Tensor, x: Tensor, yz: Tensor, xz: Tensor, x_dbl: Tensor, states: Tensor,
              *arguments):
    """Gradients of x and of the weights; those of both convolutions are one (C, K) tensor."""
    *weights, lean = arguments
    weights = Weights(*weights)
    weights = weights._replace(D=weights.D.float())
    kept = (None,) * 3 if lean else (xz, x_dbl, states)
    with _without_autocast(x):
        one, pointers = find(
            _BACKWARD, (*weights.read, x, *weights, *kept), (lean,),
            lambda: Backward(x, weights, kept, lean),
        )
        dx, dw_in, dw_conv, *rest = one.run(dout, x, yz, *kept, weights, pointers[:5])
    return dx, dw_in, dw_conv.view(x.shape[-1], -1), *rest


def _backward_operator(dout, x, yz, xz, x_dbl, states, weights, lean: bool) -> list[Tensor]:
    """The backward pass as an operator, which says no to a second derivative."""
    filters = weights[1].shape
    weights[1:3] = (w.flatten(1) for w in weights[1:3])
    if lean:
        xz = x_dbl = states = x.new_empty(0)
    else:
        states = _as_states(states, x, Weights(*weights))
    dx, dw_in, dw_conv, *rest = torch.ops.mmhybrid.mambavision_mixer_backward(
        dout, x, yz, xz, x_dbl, states, *weights, lean
    )
    return [dx, dw_in, *(dw.view(filters) for dw in dw_conv.chunk(2)), *rest]


def _forward_fake(x, *arguments):
    *weights, lean = arguments
    weights = Weights(*weights)
    channels, state, rank = weights.sizes
    shape = shape_of(x, weights)
    tokens = x.shape[0] * x.shape[1]
    out, yz = x.new_empty(x.shape), x.new_empty(x.shape)
    if lean:
        return out, yz, *(x.new_empty(0) for _ in range(3))
    return (
        out,
        yz,
        x.new_empty(x.shape),
        x.new_empty(tokens, rank + 2 * state),
        x.new_empty(shape.batch, shape.n_kept, state, channels, dtype=torch.float32),
    )


def _backward_fake(dout, x, yz, xz, x_dbl, states, *arguments):
    weights = Weights(*arguments[:-1])

    def parameter(like, *shape):
        return like.new_empty(shape or like.shape, dtype=torch.float32)

    return (
        x.new_empty(x.shape),
        x.new_empty(weights.w_in.shape),
        parameter(weights.w_conv_x, x.shape[2], weights.w_conv_x.shape[1]),
        x.new_empty(weights.w_x.shape),
        x.new_empty(weights.w_dt.shape),
        parameter(weights.dt_bias),
        parameter(weights.A_log),
        parameter(weights.D),
        x.new_empty(weights.w_out.shape),
    )


def _setup_context(ctx, inputs, output):
    x, *weights, ctx.lean = inputs
    ctx.save_for_backward(x, *output[1:], *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, *_):
    if dout is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    weights = Weights(*saved[5:])
    dx, dw_in, dw_conv, *rest = torch.ops.mmhybrid.mambavision_mixer_backward(
        dout, *saved, ctx.lean
    )
    dw_conv_x, dw_conv_z = dw_conv.chunk(2)
    grads = (dw_in, dw_conv_x, dw_conv_z, *rest)
    grads = (grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True))
    return dx, *grads, None


_WEIGHTS = ', '.join(f'Tensor {name}' for name in Weights._fields)
library.register(
    'mambavision_mixer',
    schema=(
        f'(Tensor x, {_WEIGHTS}, bool lean) -> '
        '(Tensor out, Tensor yz, Tensor xz, Tensor x_dbl, Tensor states)'
    ),
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        '(Tensor dout, Tensor x, Tensor yz, Tensor xz, Tensor x_dbl, Tensor states, '
        f'{_WEIGHTS}, bool lean) -> ({", ".join(["Tensor"] * 9)})'
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'the fused MambaVision mixer has a first derivative only, and a second one was asked for '
        "(create_graph=True); use MambaVisionMixer(..., fused=False, backend='reference')."
    ),
)


def fused_mixer(
    x: Tensor,
    w_in: Tensor,
    w_conv_x: Tensor,
    w_conv_z: Tensor,
    w_x: Tensor,
    w_dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    w_out: Tensor,
    lean: bool = False,
) -> Tensor:
    """MambaVision's mixer in four matrix products and two to four kernels, token-major.

    The mathematics is that of :class:`mmhybrid.layers.MambaVisionMixer`; convolutions, softplus and
    scan compute in float32, every tensor over tokens is stored in x's dtype. Under autocast, x and
    the projections are cast as ``F.linear`` would cast them. Differentiable once, in every tensor.
    Nothing is checked but what :func:`unsupported_reason` says.

    Args:
        x: tokens, (B, L, C), float32, bfloat16 or float16.
        w_in: (C, C).
        w_conv_x: filters of the scanned half with odd K, (E, 1, K) as those of ``nn.Conv1d`` or
            (E, K), any floating dtype.
        w_conv_z: filters of the other half, like w_conv_x.
        w_x: (R + 2 N, E).
        w_dt: (E, R).
        dt_bias: (E,), any floating dtype; it enters the step twice.
        A_log: (E, N) with N up to 16, any floating dtype.
        D: (E,), any floating dtype.
        w_out: (C, C).
        lean: keep x and the input of the last projection only (4 bytes per token and channel in
            bfloat16 instead of about 7) and compute the rest again in the backward pass.

    Returns:
        (B, L, C) in the dtype of the projections.
    """
    tensors = (x, w_in, w_conv_x, w_conv_z, w_x, w_dt, dt_bias, A_log, D, w_out)
    return mix(tensors, lean, prepared(tensors, lean, 'triton'))


def _through_operator(
    x, w_in, w_conv_x, w_conv_z, w_x, w_dt, dt_bias, A_log, D, w_out, lean: bool
) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w_in, w_x, w_dt, w_out = (t.to(dtype) for t in (x, w_in, w_x, w_dt, w_out))
    filters = (w.flatten(1).contiguous() for w in (w_conv_x, w_conv_z))
    read = (t.contiguous() for t in (dt_bias, A_log, D))
    weights = (w_in, *filters, w_x, w_dt, *read, w_out)
    # Without a backward pass nothing is kept.
    lean = lean or not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)))
    return torch.ops.mmhybrid.mambavision_mixer(x.contiguous(), *weights, lean)[0]
