"""Causal depth-wise convolution and SiLU along walks: its calls, passes and PyTorch operators.

B batch, K walks, E channels, L tokens, S steps of a walk (S >= L), T taps.
"""

import torch
from torch import Tensor

from .. import library, triton_support
from ..selective_scan import launch
from ..selective_scan.launch import Launch, Place, Program
from ..selective_scan.passes import find, remember

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
            are no tokens. See :meth:`mmhybrid.ops.cross_scan.ScanPlan.permutation`.
        steps: int32 (K, S), the inverse of each row.

    Returns:
        (B, K, E, S) in u's dtype, differentiable once in u, weight and bias.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: Triton cannot run here; the message says why.
    """
    tensors = (u, weight, bias, slots, steps)
    ready = launch.prepared(_CALLS, tensors)
    if ready is not None and ready.call is not None:  # has passed all of the below
        return ready.call(tensors, ready.pointers)

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
    if ready is None:
        return torch.ops.mmhybrid.walk_conv(*tensors)
    call = _Call(tensors)
    remember(_CALLS, ready.key, call)
    return call(tensors, ready.pointers)


def _sizes(u: Tensor, weight: Tensor, slots: Tensor, lines: int, rows: int = _ROWS,
           repeat: int = 1) -> dict[str, int]:
    return dict(
        batch=u.shape[0], walks=weight.shape[0], channels=u.shape[1], tokens=u.shape[2],
        steps=slots.shape[1], tiles=-(-lines // (rows * repeat)), blocks=-(-u.shape[1] // _COLS),
        T=weight.shape[2], ROWS=rows, COLS=_COLS, num_warps=4,
    )


def _strides(u: Tensor) -> dict[str, int]:
    return dict(u_sb=u.stride(0), u_sl=u.stride(2), u_sd=u.stride(1))


class _Stack:
    """A (B, K, E, S) that lies as (K, B, S, E), one matrix of rows per walk."""

    def __init__(self, like: Tensor, walks: int, steps: int):
        batch, channels, _ = like.shape
        self.size = batch, walks, channels, steps
        self.stride = steps * channels, batch * steps * channels, 1, channels

    def empty(self, like: Tensor) -> Tensor:
        """Uninitialised, with the dtype and on the device of another."""
        return like.new_empty_strided(self.size, self.stride)


class _Pass:
    """What both passes have in common: weights and tables that lie otherwise are copied."""

    def __init__(self, tensors, dense: tuple[int, ...]):
        self.copies = tuple(i for i in dense if not tensors[i].is_contiguous())

    def copied(self, tensors, pointers):
        """The tensors as the kernels take them, with their addresses."""
        tensors, pointers = [*tensors], [*pointers]
        for i in self.copies:
            tensors[i] = tensors[i].contiguous()
            pointers[i] = tensors[i].data_ptr()
        return tensors, pointers


class Forward(_Pass):
    """One kind of forward pass; its tensors are u, weight, bias and slots."""

    def __init__(self, tensors):
        from . import triton_kernels as kernels

        super().__init__(tensors, (1, 2, 3))
        u, weight, _, slots = tensors
        walks, length = slots.shape
        self.out = _Stack(u, walks, length)
        sizes = _sizes(u, weight, slots, length)
        places = dict(
            p_u=Place(0), p_weight=Place(1), p_bias=Place(2), p_slots=Place(3), p_out=Place(4)
        )
        grid = (walks * u.shape[0] * sizes['tiles'] * sizes['blocks'],)
        constants = _strides(u) | sizes
        self.program = Program(kernels, [Launch('walk_conv_kernel', grid, places, constants)])

    def run(self, tensors, pointers) -> Tensor:
        """The output."""
        out = self.out.empty(tensors[0])
        self.run_into(out, tensors, pointers)
        return out

    def run_into(self, out: Tensor, tensors, pointers) -> None:
        """The output goes into memory of its size that lies as (K, B, S, E)."""
        if self.copies:
            tensors, pointers = self.copied(tensors, pointers)
        self.program.run((*tensors, out), (*pointers, out.data_ptr()))


class Backward(_Pass):
    """One kind of backward pass: a kernel for the sums, and one for the gradient of u.

    Its tensors are the gradient of the output, u, weight, bias, slots and steps.

    Args:
        tensors: as above.
        row: values between the tokens of the gradient of u where the caller has a place for it.
    """

    def __init__(self, tensors, row: int | None = None):
        from . import triton_kernels as kernels

        super().__init__(tensors, (2, 3, 4, 5))
        dout, u, weight, _, slots, _ = tensors
        walks, length = slots.shape
        batch, channels, tokens = u.shape
        self.g = _Stack(u, walks, length)
        self.du = u.shape, (tokens * channels, 1, channels)
        self.taps = weight.shape[2]
        sizes = _sizes(u, weight, slots, length, _SUM_ROWS, _REPEAT)
        self.sums = walks, batch * sizes['tiles'], self.taps + 1, channels
        of_dout = dict(dout_sk=dout.stride(1), dout_sb=dout.stride(0), dout_sl=dout.stride(3),
                       dout_sd=dout.stride(2))
        sums = Launch(
            'walk_conv_weights_kernel', (walks * batch * sizes['tiles'] * sizes['blocks'],),
            dict(
                p_u=Place(1), p_weight=Place(2), p_bias=Place(3), p_slots=Place(4),
                p_dout=Place(0), p_g=Place(6), p_sums=Place(7),
            ),
            dict(REPEAT=_REPEAT) | _strides(u) | of_dout | sizes,
        )
        sizes = _sizes(u, weight, slots, tokens)
        inputs = Launch(
            'walk_conv_input_kernel', (batch * sizes['tiles'] * sizes['blocks'],),
            dict(
                p_g=Place(6), p_weight=Place(2), p_slots=Place(4), p_steps=Place(5), p_du=Place(8)
            ),
            dict(du_sl=row or channels) | sizes,
        )
        self.program = Program(kernels, [sums, inputs])

    def run(self, tensors, pointers) -> tuple[Tensor, ...]:
        """Gradients of u, weight and bias."""
        u, weight = tensors[1:3]
        du = u.new_empty_strided(*self.du)
        sums = self.run_into(du, tensors, pointers)
        # Laid out as the fake says; `to` alone would leave float32 transposed.
        dweight = sums[:, : self.taps].mT.to(weight.dtype).contiguous()
        return du, dweight, sums[:, self.taps]

    def run_into(self, du: Tensor, tensors, pointers) -> Tensor:
        """The gradient of u goes into du; those of the taps and the bias are (K, T + 1, E)."""
        if self.copies:
            tensors, pointers = self.copied(tensors, pointers)
        u = tensors[1]
        g, sums = self.g.empty(u), u.new_empty(self.sums, dtype=torch.float32)
        self.program.run(
            (*tensors, g, sums, du),
            (*pointers, g.data_ptr(), sums.data_ptr(), du.data_ptr()),
        )
        return sums.sum(1)


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
        self.forward = Forward(tensors[:4])
        self.backward: dict[tuple, Backward] = {}
        self.gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    def __call__(self, tensors, pointers) -> Tensor:
        """The output."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        return self.forward.run(tensors[:4], pointers[:4])


class _WalkConv(torch.autograd.Function):
    """The convolution where nothing looks into it."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.call = call
        return call.forward.run(tensors[:4], pointers[:4])

    @staticmethod
    def backward(ctx, dout):
        tensors = (dout, *ctx.saved_tensors)
        watched = torch.is_grad_enabled() or launch.intercepted()
        found = None if watched else launch.describe(tensors)
        if found is None:  # the operator says no to a second derivative
            grads = torch.ops.mmhybrid.walk_conv_backward(*tensors)
            return None, None, *grads, None, None
        pointers, description = found
        key = tuple(description)
        one = ctx.call.backward.get(key)
        if one is None:
            one = Backward(tensors)
            remember(ctx.call.backward, key, one)
        return None, None, *one.run(tensors, pointers), None, None


_apply = launch.fast_apply(_WalkConv)


# The operators, where something looks into the convolution.


def _forward(u, weight, bias, slots, steps):
    tensors = (u, weight, bias, slots)
    one, pointers = find(_FORWARD, tensors, (), lambda: Forward(tensors))
    return one.run(tensors, pointers)


def _backward(*tensors):
    one, pointers = find(_BACKWARD, tensors, (), lambda: Backward(tensors))
    du, dweight, dbias = one.run(tensors, pointers)
    # Results of an operator share no memory.
    return du, dweight, dbias.to(tensors[3].dtype, copy=True)


def _forward_fake(u, weight, bias, slots, steps):
    return _Stack(u, *slots.shape).empty(u)


def _backward_fake(dout, u, weight, bias, slots, steps):
    batch, channels, tokens = u.shape
    return (u.new_empty(batch, tokens, channels).mT, weight.new_empty(weight.shape),
            bias.new_empty(bias.shape))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout):
    grads = torch.ops.mmhybrid.walk_conv_backward(dout, *ctx.saved_tensors)
    return (*grads, None, None)


_INPUTS = 'Tensor u, Tensor weight, Tensor bias, Tensor slots, Tensor steps'
library.register(
    'walk_conv',
    schema=f'({_INPUTS}) -> Tensor',
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=f'(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor)',
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'walk_conv has a first derivative only, and a second one was asked for '
        "(create_graph=True); build the model with scan_backend='reference'."
    ),
)
