"""The fused MambaVision mixer: launchers and PyTorch operators.

B batch, L tokens, C channels, E = C / 2, N state, R rank of the step, K taps, M = B L. Everything
lies token-major. Importing this file needs no Triton; the kernels are imported when first used.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_support
from ..selective_scan import passes
from ..selective_scan import plan as plans
from ..selective_scan import triton_backend as scan

__all__ = ['fused_mixer', 'refusal']

# Tokens of a tile. Sixteen rows by 64 channels give each of 128 threads 16 bytes of bfloat16.
_ROWS = 16
# Tokens between the states that are kept for the backward pass: 32 bytes of float32 states per
# scanned channel (N = 8) every 16 tokens are 1 byte per token and channel of the mixer.
_MIN_CHUNK = 16


def refusal(device: torch.device, dtype: torch.dtype, state: int) -> str | None:
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


class _Weights(NamedTuple):
    """Parameters in the order of the operators' schema; projections in the dtype of the tokens."""

    w_in: Tensor  # (C, C)
    w_conv_x: Tensor  # (E, K)
    w_conv_z: Tensor  # (E, K)
    w_x: Tensor  # (R + 2 N, E)
    w_dt: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    w_out: Tensor  # (C, C)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, N and R."""
        return *self.A_log.shape, self.w_dt.shape[1]


class _Shape(NamedTuple):
    """B, L and the tokens between kept states (with which of the scan's states those are)."""

    batch: int
    length: int
    chunk: int
    every: int
    n_kept: int


def _shape(x: Tensor, weights: _Weights) -> _Shape:
    batch, length, _ = x.shape
    channels, state, _ = weights.sizes
    processors = passes.processors(x.device)
    plan = plans.launch_plan(batch, 1, channels, length, state, processors, gradients=True)
    if plan.n_chunks == 1:
        return _Shape(batch, length, plan.chunk, 1, 0)
    every = max(1, -(-_MIN_CHUNK // plan.chunk))
    kept = -(-plan.n_chunks // every)
    return _Shape(batch, length, plan.chunk * every, every, kept if kept > 1 else 0)


def _without_autocast(x: Tensor):
    """Autocast off; meta tensors, with which tests look at launches, know none."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _cut(shape: _Shape, channels: int, device: torch.device) -> dict[str, int]:
    """How the tokens and channels of a mixer are cut into programs."""
    # Wide enough for full memory transactions, with few idle lanes at the end.
    block = 64 if channels % 64 == 0 or channels % 64 > 32 else 32
    tiles = shape.batch * -(-shape.length // _ROWS) * -(-channels // block)
    # More tiles in turn load the filters once for all of them, and leave fewer partial sums of
    # their gradients; fewer keep every multiprocessor busy.
    steps = max(1, min(4, tiles // (4 * passes.processors(device))))
    return dict(
        length=shape.length,
        n_tiles=-(-shape.length // (_ROWS * steps)),
        steps=steps,
        ROWS=_ROWS,
        BLOCK=block,
    )


def _as_scan(x: Tensor, batch: int) -> Tensor:
    """A view (B, 1, D, L) of tokens (M, D), whatever their row stride."""
    length, row = x.shape[0] // batch, x.stride(0)
    # Exact strides even where an axis has one element: kernels derive addresses from them.
    return x.as_strided(
        (batch, 1, x.shape[1], length), (length * row, length * row, 1, row), x.storage_offset()
    )


def _convolve(xz: Tensor, yz: Tensor | None, shape: _Shape, weights: _Weights):
    """u (M, E), A (E, N) and twice the step's bias; writes the gate half of yz when given."""
    from . import triton_kernels as kernels

    channels, state, _ = weights.sizes
    taps = weights.w_conv_x.shape[1]
    u = xz.new_empty(xz.shape[0], channels)
    A = xz.new_empty(channels, state, dtype=torch.float32)
    step_bias = xz.new_empty(channels, dtype=torch.float32)
    cut = _cut(shape, channels, xz.device)
    with torch.cuda.device_of(xz):
        kernels.prescan_kernel[(shape.batch * cut['n_tiles'], -(-channels // cut['BLOCK']))](
            p_xz=xz,
            p_wx=weights.w_conv_x,
            p_wz=weights.w_conv_z,
            p_log=weights.A_log,
            p_bias=weights.dt_bias,
            p_u=u,
            p_yz=yz,
            p_A=A,
            p_step=step_bias,
            channels=channels,
            N=state,
            K=taps,
            LEFT=taps // 2,
            WITH_Z=yz is not None,
            num_warps=4,
            **cut,
        )
    return u, A, step_bias


def _convolve_backward(xz: Tensor, du: Tensor, dyz: Tensor, shape: _Shape, weights: _Weights):
    """dxz (M, C) and the gradients of both convolutions' weights as one (C, K), float32."""
    from . import triton_kernels as kernels

    channels = weights.D.shape[0]
    taps = weights.w_conv_x.shape[1]
    cut = _cut(shape, channels, xz.device)
    programs = shape.batch * cut['n_tiles']
    dxz = torch.empty_like(xz)
    parts = xz.new_empty(programs, 2 * channels, taps, dtype=torch.float32)
    with torch.cuda.device_of(xz):
        kernels.prescan_backward_kernel[(programs, -(-channels // cut['BLOCK']))](
            p_xz=xz,
            p_wx=weights.w_conv_x,
            p_wz=weights.w_conv_z,
            p_du=du,
            p_dyz=dyz,
            p_dxz=dxz,
            p_dw=parts,
            channels=channels,
            K=taps,
            LEFT=taps // 2,
            num_warps=4,
            **cut,
        )
    return dxz, parts.sum(0)


def _scan_inputs(u, step_bias, A, x_dbl, delta, batch, weights):
    """The scan's arguments up to the table of tokens, as views of what the projections made."""
    _, state, rank = weights.sizes
    return (
        _as_scan(u, batch),
        _as_scan(delta, batch),
        A,
        _as_scan(x_dbl[:, rank : rank + state], batch),
        _as_scan(x_dbl[:, rank + state :], batch),
        weights.D.float(),
        None,
        step_bias,
        None,
    )


def _forward(x: Tensor, *arguments):
    """The forward pass: the output, and what the backward pass needs beside x."""
    *weights, lean = arguments
    weights = _Weights(*weights)
    channels, _, rank = weights.sizes
    shape = _shape(x, weights)
    with _without_autocast(x):
        xz = x.reshape(-1, 2 * channels) @ weights.w_in.t()
        yz = torch.empty_like(xz)
        u, A, step_bias = _convolve(xz, yz, shape, weights)
        x_dbl = u @ weights.w_x.t()
        delta = x_dbl[:, :rank] @ weights.w_dt.t()
        inputs = _scan_inputs(u, step_bias, A, x_dbl, delta, shape.batch, weights)
        into = _as_scan(yz[:, :channels], shape.batch)
        # Without states to keep, the chunks are those of a forward pass alone.
        states = passes.forward(inputs, True, False, not lean, out=into)[2]
        out = (yz @ weights.w_out.t()).view(x.shape)
    if lean:
        return out, yz, *(x.new_empty(0) for _ in range(3))
    if shape.every > 1:
        states = states[:, :: shape.every][:, : shape.n_kept].contiguous()
    return out, yz, xz, x_dbl, states


def _backward(dout: Tensor, x: Tensor, yz: Tensor, xz: Tensor, x_dbl: Tensor, states: Tensor,
              *arguments):  # fmt: skip
    """Gradients of x and of the weights; those of both convolutions are one (C, K) tensor."""
    *weights, lean = arguments
    weights = _Weights(*weights)
    channels, state, rank = weights.sizes
    shape = _shape(x, weights)
    x_rows = x.reshape(-1, 2 * channels)
    dout = dout.reshape(-1, 2 * channels)
    with _without_autocast(x):
        if lean:
            xz = x_rows @ weights.w_in.t()
        u, A, step_bias = _convolve(xz, None, shape, weights)
        if lean:
            x_dbl = u @ weights.w_x.t()
        delta = x_dbl[:, :rank] @ weights.w_dt.t()
        inputs = _scan_inputs(u, step_bias, A, x_dbl, delta, shape.batch, weights)
        if lean:
            states = passes.forward(
                inputs, True, False, True, shape.chunk, out=inputs[0], starts=True
            )[2]

        dyz = dout @ weights.w_out
        dw_out = dout.t() @ yz
        dx_dbl = torch.empty_like(x_dbl)
        columns = (
            _as_scan(dx_dbl[:, rank : rank + state], shape.batch),
            _as_scan(dx_dbl[:, rank + state :], shape.batch),
        )
        dD = torch.empty_like(inputs[5])  # goes out of here, so it shares no memory
        du, ddelta, dA, *_, dbias = passes.backward(
            _as_scan(dyz[:, :channels], shape.batch), None, inputs, states, True, False, True,
            shape.chunk, given=(*(None,) * 3, *columns, dD, None, None),
        )  # fmt: skip
        du, ddelta = (g.squeeze(1).transpose(1, 2).flatten(0, 1) for g in (du, ddelta))
        dw_dt = ddelta.t() @ x_dbl[:, :rank]
        torch.mm(ddelta, weights.w_dt, out=dx_dbl[:, :rank])
        dw_x = dx_dbl.t() @ u
        du.addmm_(dx_dbl, weights.w_x)
        dxz, dw_conv = _convolve_backward(xz, du, dyz, shape, weights)
        dw_in = dxz.t() @ x_rows
        dx = (dxz @ weights.w_in).view(x.shape)
    return dx, dw_in, dw_conv, dw_x, dw_dt, 2 * dbias, dA * A, dD, dw_out


_WEIGHTS = ', '.join(f'Tensor {name}' for name in _Weights._fields)
_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_library.define(
    f'mambavision_mixer(Tensor x, {_WEIGHTS}, bool lean) -> '
    '(Tensor out, Tensor yz, Tensor xz, Tensor x_dbl, Tensor states)'
)
_library.define(
    'mambavision_mixer_backward(Tensor dout, Tensor x, Tensor yz, Tensor xz, Tensor x_dbl, '
    f'Tensor states, {_WEIGHTS}, bool lean) -> ({", ".join(["Tensor"] * 9)})'
)
for _device in ('CPU', 'CUDA', 'XPU'):
    _library.impl('mambavision_mixer', _forward, _device)
    _library.impl('mambavision_mixer_backward', _backward, _device)


@torch.library.register_fake('mmhybrid::mambavision_mixer', lib=_library)
def _forward_fake(x, *arguments):
    *weights, lean = arguments
    weights = _Weights(*weights)
    channels, state, rank = weights.sizes
    shape = _shape(x, weights)
    tokens = x.shape[0] * x.shape[1]
    out, yz = x.new_empty(x.shape), x.new_empty(tokens, 2 * channels)
    if lean:
        return out, yz, *(x.new_empty(0) for _ in range(3))
    return (
        out,
        yz,
        x.new_empty(tokens, 2 * channels),
        x.new_empty(tokens, rank + 2 * state),
        x.new_empty(shape.batch, shape.n_kept, state, channels, dtype=torch.float32),
    )


@torch.library.register_fake('mmhybrid::mambavision_mixer_backward', lib=_library)
def _backward_fake(dout, x, yz, xz, x_dbl, states, *arguments):
    weights = _Weights(*arguments[:-1])

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


def _autograd(ctx, dout, *_):
    if dout is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    weights = _Weights(*saved[5:])
    dx, dw_in, dw_conv, *rest = torch.ops.mmhybrid.mambavision_mixer_backward(
        dout, *saved, ctx.lean
    )
    dw_conv_x, dw_conv_z = dw_conv.chunk(2)
    grads = (dw_in, dw_conv_x, dw_conv_z, *rest)
    grads = (grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True))
    return dx, *grads, None


def _no_second_derivative(*_):
    raise RuntimeError(
        'the fused MambaVision mixer has a first derivative only, and a second one was asked for '
        "(create_graph=True); use MambaVisionMixer(..., fused=False, backend='reference')."
    )


torch.library.register_autograd(
    'mmhybrid::mambavision_mixer', _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    'mmhybrid::mambavision_mixer_backward', _no_second_derivative, lib=_library
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
    Nothing is checked but what :func:`refusal` says.

    Args:
        x: tokens, (B, L, C), float32, bfloat16 or float16.
        w_in: (C, C).
        w_conv_x: filters of the scanned half, (E, K) with odd K, any floating dtype.
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
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, w_in, w_x, w_dt, w_out = (t.to(dtype) for t in (x, w_in, w_x, w_dt, w_out))
    weights = (w_in, w_conv_x, w_conv_z, w_x, w_dt, dt_bias, A_log, D, w_out)
    # Without a backward pass nothing is kept.
    lean = lean or not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)))
    return torch.ops.mmhybrid.mambavision_mixer(
        x.contiguous(), w_in, w_conv_x.contiguous(), w_conv_z.contiguous(), w_x, w_dt, dt_bias,
        A_log.contiguous(), D, w_out, lean,
    )[0]  # fmt: skip
