"""Depth-wise 3x3 convolution and SiLU on maps: its calls, passes and PyTorch operators.

B batch, H W map, E channels, L = H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import library, triton_support
from ..selective_scan import launch
from ..selective_scan.launch import Launch, Place, Program
from ..selective_scan.passes import find, processors, remember

__all__ = ['map_conv', 'map_conv_reference']

# Pixels and channels of a tile.
_ROWS, _COLS = 32, 64
# The kernel that sums gradients of weights holds twenty tiles at once, so smaller ones, and goes
# through several of them.
_SUM_ROWS, _MOST_REPEAT = 8, 16
_TAPS = 9


def map_conv(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(conv(u)) with a depth-wise 3x3 kernel and zeros around the map, on a GPU with Triton.

    Pixels are read where they are and with their neighbours' channels side by side, so the map may
    be a part of the channels of a larger one and nothing is laid out anew. Weights are taken in
    their own dtype; sums are float32.

    Args:
        u: (B, H, W, E), any floating dtype; pixels of an image evenly spaced in memory.
        weight: (E, 1, 3, 3).
        bias: (E,).

    Returns:
        (B, H, W, E) in u's dtype, contiguous, differentiable once in u, weight and bias.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: Triton cannot run here; the message says why.
    """
    tensors = (u, weight, bias)
    ready = launch.prepared(_CALLS, tensors)
    if ready is not None and ready.call is not None:  # has passed all of the below
        return ready.call(tensors, ready.pointers)

    reason = triton_support.reason(u.device)
    if reason:
        raise RuntimeError(f'map_conv needs the Triton kernels, but {reason}.')
    E = u.shape[-1]
    if u.dim() != 4 or weight.shape != (E, 1, 3, 3) or (bias is not None and bias.shape != (E,)):
        raise ValueError(
            f'map_conv expects u (B, H, W, E), weight (E, 1, 3, 3) and bias (E,), got '
            f'{tuple(u.shape)}, {tuple(weight.shape)} and '
            f'{None if bias is None else tuple(bias.shape)}.'
        )
    if ready is None or u.numel() == 0 or not _evenly_spaced(u):
        return torch.ops.mmhybrid.map_conv(_evenly(u), weight, bias)
    call = _Call(tensors)
    remember(_CALLS, ready.key, call)
    return call(tensors, ready.pointers)


def map_conv_reference(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in PyTorch, on any device; under autocast in its precision."""
    x = F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=1, groups=u.shape[-1])
    # New memory for a large map costs a CPU more than the activation does.
    kept = x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return F.silu(x, inplace=not kept).permute(0, 2, 3, 1)


def _evenly_spaced(u: Tensor) -> bool:
    """Whether one stride leads from each pixel to the next, also from row to row."""
    return u.shape[1] == 1 or u.shape[2] == 1 or u.stride(1) == u.shape[2] * u.stride(2)


def _evenly(u: Tensor) -> Tensor:
    return u if _evenly_spaced(u) else u.contiguous()


def _step(u: Tensor) -> int:
    """Elements from pixel to pixel."""
    return u.stride(2) if u.shape[2] > 1 else u.stride(1)


def _sizes(u: Tensor, lines: int) -> dict[str, int]:
    _, height, width, channels = u.shape
    return dict(channels=channels, height=height, width=width, tiles=-(-height * width // lines),
                blocks=-(-channels // _COLS), COLS=_COLS, num_warps=4)


def _parts(u: Tensor) -> tuple[int, int]:
    """Tiles that a program of the sums goes through, and programs per image and block.

    As many tiles as leave two programs for every multiprocessor.
    """
    batch, height, width, channels = u.shape
    tiles = -(-height * width // _SUM_ROWS)
    programs = batch * tiles * -(-channels // _COLS)
    repeat = min(max(programs // (2 * processors(u.device)), 1), _MOST_REPEAT)
    return repeat, -(-tiles // repeat)


class _Pass:
    """What both passes have in common: weights that lie otherwise are copied."""

    def __init__(self, tensors, dense: tuple[int, ...]):
        self.copies = tuple(
            i for i in dense if tensors[i] is not None and not tensors[i].is_contiguous()
        )

    def copied(self, tensors, pointers):
        """The tensors as the kernels take them, with their addresses."""
        tensors, pointers = [*tensors], [*pointers]
        for i in self.copies:
            tensors[i] = tensors[i].contiguous()
            pointers[i] = tensors[i].data_ptr()
        return tensors, pointers


class Forward(_Pass):
    """One kind of forward pass; its tensors are u, weight and bias."""

    def __init__(self, tensors):
        from . import triton_kernels as kernels

        super().__init__(tensors, (1, 2))
        u, _, bias = tensors
        self.size = u.shape
        sizes = _sizes(u, _ROWS) | dict(ROWS=_ROWS)
        places = dict(
            p_u=Place(0), p_weight=Place(1), p_bias=None if bias is None else Place(2),
            p_out=Place(3),
        )
        constants = dict(u_sb=u.stride(0), u_sl=_step(u), u_sd=u.stride(3)) | sizes
        grid = (u.shape[0] * sizes['tiles'] * sizes['blocks'],)
        self.program = Program(kernels, [Launch('map_conv_kernel', grid, places, constants)])

    def run(self, tensors, pointers) -> Tensor:
        """The output."""
        if self.copies:
            tensors, pointers = self.copied(tensors, pointers)
        out = tensors[0].new_empty(self.size)
        self.program.run((*tensors, out), (*pointers, out.data_ptr()))
        return out


class Backward(_Pass):
    """One kind of backward pass: a kernel before the SiLU, and one for the gradients.

    Its tensors are the gradient of the output, u, weight and bias.
    """

    def __init__(self, tensors):
        from . import triton_kernels as kernels

        super().__init__(tensors, (2, 3))
        dout, u, weight, bias = tensors
        if not _evenly_spaced(dout):
            self.copies += (0,)
            dout = dout.contiguous()
        batch, height, width, channels = self.size = u.shape
        repeat, parts = _parts(u)
        rows = batch * parts
        self.sums = rows, _TAPS + 1, channels
        given = None if bias is None else Place(3)
        common = _sizes(u, _SUM_ROWS)
        sums = Launch(
            'map_conv_weights_kernel', (rows * common['blocks'],),
            dict(p_u=Place(1), p_weight=Place(2), p_bias=given, p_dout=Place(0), p_g=Place(4),
                 p_sums=Place(5)),
            dict(
                u_sb=u.stride(0), u_sl=_step(u), u_sd=u.stride(3), dout_sb=dout.stride(0),
                dout_sl=_step(dout), dout_sd=dout.stride(3), repeat=repeat, parts=parts,
                ROWS=_SUM_ROWS,
            ) | common,
        )
        common = _sizes(u, _ROWS)
        over_tiles = batch * common['tiles'] * common['blocks']
        inputs = Launch(
            'map_conv_input_kernel', (over_tiles + (_TAPS + 1) * common['blocks'],),
            dict(p_g=Place(4), p_weight=Place(2), p_sums=Place(5), p_du=Place(6),
                 p_dweight=Place(7), p_dbias=None if bias is None else Place(8)),
            dict(rows=rows, over_tiles=over_tiles, ROWS=_ROWS) | common,
        )
        self.program = Program(kernels, [sums, inputs])

    def run(self, tensors, pointers) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of u, weight and bias."""
        if self.copies:
            tensors, pointers = self.copied(tensors, pointers)
        _, u, weight, bias = tensors
        g, du = u.new_empty(self.size), u.new_empty(self.size)
        sums = u.new_empty(self.sums, dtype=torch.float32)
        dweight = weight.new_empty(weight.shape)
        dbias = None if bias is None else bias.new_empty(bias.shape)
        mine = (g, sums, du, dweight, dbias)
        self.program.run(
            (*tensors, *mine), (*pointers, *(x if x is None else x.data_ptr() for x in mine))
        )
        return du, dweight, dbias


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
        self.forward = Forward(tensors)
        self.backward: dict[tuple, Backward] = {}
        self.gradients = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in tensors
        )

    def __call__(self, tensors, pointers) -> Tensor:
        """The output."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        return self.forward.run(tensors, pointers)


class _MapConv(torch.autograd.Function):
    """The convolution where nothing looks into it."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.call = call
        return call.forward.run(tensors, pointers)

    @staticmethod
    def backward(ctx, dout):
        tensors = (dout, *ctx.saved_tensors)
        watched = torch.is_grad_enabled() or launch.intercepted()
        found = None if watched else launch.describe(tensors)
        if found is None:  # the operator says no to a second derivative
            *grads, dbias = torch.ops.mmhybrid.map_conv_backward(*tensors)
            return None, None, *grads, None if tensors[3] is None else dbias
        pointers, description = found
        key = tuple(description)
        one = ctx.call.backward.get(key)
        if one is None:
            one = Backward(tensors)
            remember(ctx.call.backward, key, one)
        return None, None, *one.run(tensors, pointers)


_apply = launch.fast_apply(_MapConv)


# The operators, where something looks into the convolution.


def _forward(*tensors):
    if tensors[0].numel() == 0:
        return _forward_fake(*tensors)
    one, pointers = find(_FORWARD, tensors, (), lambda: Forward(tensors))
    return one.run(tensors, pointers)


def _backward(*tensors):
    if tensors[1].numel() == 0:
        return tuple(x.zero_() for x in _backward_fake(*tensors))
    one, pointers = find(_BACKWARD, tensors, (), lambda: Backward(tensors))
    du, dweight, dbias = one.run(tensors, pointers)
    return du, dweight, dweight.new_empty(0) if dbias is None else dbias


def _forward_fake(u, weight, bias):
    return u.new_empty(u.shape)


def _backward_fake(dout, u, weight, bias):
    return (u.new_empty(u.shape), weight.new_empty(weight.shape),
            weight.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout):
    tensors = ctx.saved_tensors
    du, dweight, dbias = torch.ops.mmhybrid.map_conv_backward(_evenly(dout), *tensors)
    return du, dweight, None if tensors[2] is None else dbias


_INPUTS = 'Tensor u, Tensor weight, Tensor? bias'
library.register(
    'map_conv',
    schema=f'({_INPUTS}) -> Tensor',
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=f'(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor)',
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'map_conv has a first derivative only, and a second one was asked for '
        "(create_graph=True); build the model with scan_backend='reference'."
    ),
)
