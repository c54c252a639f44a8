"""Causal depth-wise convolution and SiLU along walks: the Triton launchers and operators.

B batch, K walks, E channels, L tokens, S steps of a walk (S >= L), T taps.
"""

import torch
from torch import Tensor

from .. import triton_support

__all__ = ['walk_conv']

# Steps and channels of a tile.
_ROWS, _COLS = 32, 64
# The kernel that sums gradients of weights holds ten tiles at once, so smaller ones, and goes
# through several of them.
_SUM_ROWS, _REPEAT = 16, 8


def walk_conv(u: Tensor, weight: Tensor, bias: Tensor, slots: Tensor, steps: Tensor) -> Tensor:
    """silu(bias + sum_j weight_j * u), where tap j looks T - 1 - j steps back along a walk.

    The short convolution of a Mamba block (Gu and Dao, "Mamba" (2023), section 3.4) for several
    scan directions of one map at once, on a GPU with Triton. Tokens are read where they are, so no
    direction needs a reordered copy; before the first step and at places that are no token zeros
    are read. Results lie where their tokens lie, channels side by side in memory.

    Args:
        u: (B, E, L), any strides, any floating dtype.
        weight: (K, E, T).
        bias: (K, E).
        slots: int32 (K, S), rows are permutations: the place visited at each step; places from L on
            are no tokens. See :meth:`mmhybrid.ops.cross_scan.ScanPlan.slots`.
        steps: int32 (K, S), the inverse of each row.

    Returns:
        (B, K, E, S) in u's dtype, differentiable once in u, weight and bias.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: Triton cannot run here; the message says why.
    """
    reason = triton_support.reason(u.device)
    if reason:
        raise RuntimeError(f'walk_conv needs the Triton kernels, but {reason}.')
    walks, channels, _ = weight.shape
    if (u.dim() != 3 or u.shape[1] != channels or bias.shape != (walks, channels)
            or slots.shape != steps.shape or slots.shape[0] != walks
            or slots.shape[1] < u.shape[2]):
        raise ValueError(
            f'walk_conv expects u (B, E, L), weight (K, E, T), bias (K, E), and slots and steps '
            f'(K, S) with S >= L, got {tuple(u.shape)}, {tuple(weight.shape)}, '
            f'{tuple(bias.shape)}, {tuple(slots.shape)} and {tuple(steps.shape)}.'
        )
    return torch.ops.mmhybrid.walk_conv(u, weight, bias, slots, steps)


def _stacked(like: Tensor, walks: int, steps: int) -> Tensor:
    """An uninitialised (B, K, E, S) that lies as (K, B, S, E), one matrix of rows per walk."""
    batch, channels, _ = like.shape
    return like.new_empty(walks, batch, steps, channels).permute(1, 0, 3, 2)


def _shape(u: Tensor, weight: Tensor, slots: Tensor, lines: int, rows: int = _ROWS,
           repeat: int = 1) -> dict[str, int]:
    return dict(
        batch=u.shape[0], walks=weight.shape[0], channels=u.shape[1], tokens=u.shape[2],
        steps=slots.shape[1], tiles=-(-lines // (rows * repeat)), blocks=-(-u.shape[1] // _COLS),
        T=weight.shape[2], ROWS=rows, COLS=_COLS,
    )  # fmt: skip


def _forward(u, weight, bias, slots, steps):
    from . import triton_kernels as kernels

    weight, bias = weight.contiguous(), bias.contiguous()
    walks, length = slots.shape
    out = _stacked(u, walks, length)
    shape = _shape(u, weight, slots, length)
    with torch.cuda.device_of(u):
        kernels.walk_conv_kernel[(walks * u.shape[0] * shape['tiles'] * shape['blocks'],)](
            p_u=u, p_weight=weight, p_bias=bias, p_slots=slots, p_out=out,
            u_sb=u.stride(0), u_sl=u.stride(2), u_sd=u.stride(1), num_warps=4, **shape,
        )  # fmt: skip
    return out


def _backward(dout, u, weight, bias, slots, steps):
    from . import triton_kernels as kernels

    flat_weight, flat_bias = weight.contiguous(), bias.contiguous()
    walks, length = slots.shape
    batch, channels, tokens = u.shape
    g = _stacked(u, walks, length)
    shape = _shape(u, weight, slots, length, _SUM_ROWS, _REPEAT)
    taps = shape['T']
    sums = u.new_empty(walks, batch * shape['tiles'], taps + 1, channels, dtype=torch.float32)
    du = u.new_empty(batch, tokens, channels).mT
    with torch.cuda.device_of(u):
        kernels.walk_conv_weights_kernel[(walks * batch * shape['tiles'] * shape['blocks'],)](
            p_u=u, p_weight=flat_weight, p_bias=flat_bias, p_slots=slots, p_dout=dout, p_g=g,
            p_sums=sums, u_sb=u.stride(0), u_sl=u.stride(2), u_sd=u.stride(1),
            dout_sk=dout.stride(1), dout_sb=dout.stride(0), dout_sl=dout.stride(3),
            dout_sd=dout.stride(2), REPEAT=_REPEAT, num_warps=4, **shape,
        )  # fmt: skip
        shape = _shape(u, weight, slots, tokens)
        kernels.walk_conv_input_kernel[(batch * shape['tiles'] * shape['blocks'],)](
            p_g=g, p_weight=flat_weight, p_slots=slots, p_steps=steps, p_du=du, num_warps=4,
            **shape,
        )
    sums = sums.sum(1)
    # Laid out as the fake says; `to` alone would leave float32 transposed.
    dweight = sums[:, :taps].mT.to(weight.dtype).contiguous()
    return du, dweight, sums[:, taps].to(bias.dtype, copy=True)


_library = torch.library.Library('mmhybrid', 'FRAGMENT')
_inputs = 'Tensor u, Tensor weight, Tensor bias, Tensor slots, Tensor steps'
_library.define(f'walk_conv({_inputs}) -> Tensor')
_library.define(f'walk_conv_backward(Tensor dout, {_inputs}) -> (Tensor, Tensor, Tensor)')
for _device in ('CPU', 'CUDA', 'XPU'):
    _library.impl('walk_conv', _forward, _device)
    _library.impl('walk_conv_backward', _backward, _device)


@torch.library.register_fake('mmhybrid::walk_conv', lib=_library)
def _forward_fake(u, weight, bias, slots, steps):
    return _stacked(u, *slots.shape)


@torch.library.register_fake('mmhybrid::walk_conv_backward', lib=_library)
def _backward_fake(dout, u, weight, bias, slots, steps):
    batch, channels, tokens = u.shape
    return (u.new_empty(batch, tokens, channels).mT, weight.new_empty(weight.shape),
            bias.new_empty(bias.shape))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout):
    grads = torch.ops.mmhybrid.walk_conv_backward(dout, *ctx.saved_tensors)
    return (*grads, None, None)


def _no_second_derivative(*_):
    raise RuntimeError(
        'walk_conv has a first derivative only, and a second one was asked for '
        "(create_graph=True); build the model with scan_backend='reference'."
    )


torch.library.register_autograd(
    'mmhybrid::walk_conv', _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    'mmhybrid::walk_conv_backward', _no_second_derivative, lib=_library
)
