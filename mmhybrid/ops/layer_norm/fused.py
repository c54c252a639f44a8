"""Residual sum and norm on Triton's kernels: calls, passes and PyTorch operators.

    norm(x, weight, bias, eps, dtype=None, rms=False, channels_first=False) -> out
    add_norm(residual, branch, weight, bias, eps, dtype=None, scale=None, factor=None, rms=False,
             channels_first=False) -> (sum, out)

B samples, L tokens of each, C channels, which are the last axis; tokens may lie anywhere in memory.
"""

import math
import os

import torch
from torch import Tensor

from .. import library, triton_support
from ..selective_scan import launch
from ..selective_scan.launch import Launch, Place, Program
from ..selective_scan.passes import find, processors, remember

__all__ = ['MAX_CHANNELS', 'add_norm', 'norm', 'promoted', 'unsupported_reason']

#: Environment variable that leaves norms to PyTorch when it is 0.
VARIABLE = 'MMHYBRID_FUSED_NORM'
#: A tile of the kernels holds all channels of a token.
MAX_CHANNELS = 4096
# Elements of a tile, and those of one thread.
_TILE, _THREAD = 2048, 16
# Neighbouring pixels of a tile where channels do not lie side by side: a sector of 16-bit numbers;
# fewer where a tile would have more elements than this.
_PIXELS, _MOST = 16, 8192
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why the kernels do not take these tensors, of which x or the residual is the first.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    x = tensors[0]
    if not _wanted():
        return f'{VARIABLE}=0 leaves norms to PyTorch'
    if x.is_meta:
        return 'a meta tensor has no memory'
    reason = triton_support.reason(x.device)
    if reason:
        return reason
    for t in tensors:
        if t is not None and t.dtype not in _DTYPES:
            return f'its kernels take float32, bfloat16 and float16, and a tensor is {t.dtype}'
    if x.shape[-1] > MAX_CHANNELS:
        return f'its kernels take up to {MAX_CHANNELS} channels and there are {x.shape[-1]}'
    if x.dim() < 2 or x.numel() == 0:
        return f'its kernels take (B, ..., C) with at least one token, got {tuple(x.shape)}'
    return None


def _wanted() -> bool:
    wish = os.environ.get(VARIABLE, '1')
    if wish not in ('0', '1'):
        raise ValueError(
            f'{VARIABLE}={wish}, and it may be 1 (fused norms where Triton runs, as without it) or '
            '0 (leave norms to PyTorch); set one of them.'
        )
    return wish == '1'


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
         dtype: torch.dtype | None = None, rms: bool = False,
         channels_first: bool = False) -> Tensor:
    """Layer norm, or RMS norm, over the last axis, rounded once to the dtype of the result.

    Args:
        x: (B, ..., C) in float32, bfloat16 or float16, any strides.
        weight: (C,).
        bias: (C,) or None.
        eps: added to the variance, or to the mean square.
        dtype: of the result, None for that of x.
        rms: whether to divide by the root of the mean square and subtract no mean.
        channels_first: whether the result lies in memory as (B, C, ...) does, whatever the input.

    Returns:
        Like x, dense. Differentiable once, in x, weight and bias; the gradient of x lies as x does.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: the kernels cannot run; the message says why.
    """
    tensors = x, None, None, None, weight, bias
    return _norm(tensors, eps, dtype or x.dtype, rms, channels_first)


def add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    rms: bool = False,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum of :func:`sum_reference`, and the norm of it.

    Args:
        residual: (B, ..., C) in float32, bfloat16 or float16, any strides.
        branch: like the residual, in any of these dtypes.
        weight: of the norm, (C,).
        bias: of the norm, (C,) or None.
        eps: added to the variance, or to the mean square.
        dtype: of the norm, None for that of the sum.
        scale: of the branch, one number for each channel, (C,), or None.
        factor: of the branch, one number for each sample, (B,), or None; it gets no gradient.
        rms: whether to divide by the root of the mean square and subtract no mean.
        channels_first: whether results lie in memory as (B, C, ...) does, whatever the inputs.

    Returns:
        (sum, norm of the sum), dense. The sum has the dtype to which PyTorch promotes, and the norm
        is that of the rounded sum. Differentiable once.

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: the kernels cannot run; the message says why.
    """
    tensors = residual, branch, scale, factor, weight, bias
    dtype = dtype or promoted(residual, branch, scale)
    return _norm(tensors, eps, dtype, rms, channels_first)


def _norm(tensors, *flags):
    ready = launch.prepared(_CALLS, tensors, *flags)
    if ready is not None and ready.call is not None:  # has passed all of the below
        return ready.call(tensors, ready.pointers)
    _check(*tensors)
    if ready is None:
        total, out, _ = torch.ops.mmhybrid.add_norm(*tensors, *flags)
        return out if tensors[1] is None else (total, out)
    call = _Call(tensors, *flags)
    remember(_CALLS, ready.key, call)
    return call(tensors, ready.pointers)


def _check(x, branch, scale, factor, weight, bias) -> None:
    reason = unsupported_reason(x, branch, scale, factor, weight, bias)
    if reason:
        raise RuntimeError(f'the fused norm needs the Triton kernels, but {reason}.')
    of_channels, of_samples = (x.shape[-1],), (x.shape[0],)
    expected = x.shape, of_channels, of_samples, of_channels, of_channels
    found = branch, scale, factor, weight, bias
    for t, shape in zip(found, expected, strict=True):
        if t is not None and t.shape != shape:
            shapes = ', '.join('None' if t is None else str(tuple(t.shape)) for t in found)
            raise ValueError(
                'the fused norm expects branch like x (B, ..., C), scale, weight and bias (C,), '
                f'and factor (B,), got x {tuple(x.shape)} and {shapes}.'
            )


def promoted(x: Tensor, branch: Tensor | None, scale: Tensor | None = None) -> torch.dtype:
    """The dtype to which PyTorch promotes the sum of :func:`sum_reference`."""
    dtype = x.dtype
    for t in (branch, scale):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


# --- how tensors lie ------------------------------------------------------------------------------


def _steps(size, stride) -> tuple[int, int, int] | None:
    """Strides of samples, tokens and channels; None where tokens have no common one."""
    step = extent = None
    for n, s in zip(reversed(size[1:-1]), reversed(stride[1:-1]), strict=True):
        if n == 1:
            continue
        if step is None:
            step = s
        elif s != extent:
            return None
        extent = s * n
    return stride[0], step or 0, stride[-1]


def _contiguous(size) -> tuple[int, ...]:
    return torch.empty(size, device='meta').stride()


class _New:
    """A dense tensor to be made, with entries for each token."""

    def __init__(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype):
        self.size, self.stride, self.dtype = size, stride, dtype
        self.steps = _steps(size, stride)

    @classmethod
    def like(cls, x: Tensor, dtype: torch.dtype) -> '_New':
        """Lies as x does, where kernels can write that."""
        new = cls(x.shape, torch.empty_like(x, device='meta').stride(), dtype)
        return cls(x.shape, _contiguous(x.shape), dtype) if new.steps is None else new

    @classmethod
    def shaped(cls, x: Tensor, dtype: torch.dtype, channels_first: bool) -> '_New':
        """Has the shape of x."""
        if not channels_first:
            return cls(x.shape, _contiguous(x.shape), dtype)
        batch, *tokens, channels = x.shape
        first, across, *along = _contiguous((batch, channels, *tokens))
        return cls(x.shape, (first, *along, across), dtype)

    def empty(self, x: Tensor) -> Tensor:
        """Uninitialised, on the device of x."""
        return x.new_empty_strided(self.size, self.stride, dtype=self.dtype)


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class _Pass:
    """What both passes have in common: how tokens are cut into tiles, and what has to be copied.

    Args:
        tensors: that come in.
        tokens: places among them of what has an entry for each token.
        made: of what the pass makes for each token.
        whole: whether samples must be told apart.
    """

    def __init__(self, tensors, tokens: tuple[int, ...], made: list[_New | None], whole: bool):
        present = [i for i, t in enumerate(tensors) if t is not None]
        self.copies = [
            i for i in present
            if (_steps(tensors[i].shape, tensors[i].stride()) is None if i in tokens
                else not tensors[i].is_contiguous())
        ]
        self.steps = {i: self._steps(tensors[i], i) for i in tokens if i in present}
        size = tensors[tokens[-1]].shape
        self.batch, self.length, self.channels = size[0], math.prod(size[1:-1]), size[-1]
        self.total = self.batch * self.length
        lying = [*self.steps.values(), *(like.steps for like in made if like is not None)]
        # Tokens of all samples are one row of tokens where nothing tells them apart.
        if not whole and all(
            sb == sl * self.length or self.batch == 1 or self.length == 1 for sb, sl, _ in lying
        ):
            self.merged = self.length == 1
            self.batch, self.length = 1, self.total
        else:
            self.merged = False
        self.cols = _next_power(self.channels)
        across = any(sl == 1 and sd != 1 for _, sl, sd in lying)
        rows = max(1, _TILE // self.cols, across * min(_PIXELS, _MOST // self.cols))
        self.rows = min(rows, _next_power(self.length))
        self.whole = across and self.length % self.rows == 0
        self.warps = max(1, min(16, self.rows * self.cols // (32 * _THREAD)))
        self.tiles = -(-self.length // self.rows)

    def _steps(self, x: Tensor, i: int):
        stride = _contiguous(x.shape) if i in self.copies else x.stride()
        return _steps(x.shape, stride)

    def strides(self, name: str, steps: tuple[int, int, int] | None) -> dict[str, int]:
        """Arguments of a kernel."""
        sb, sl, sd = steps or (0, 0, 0)
        if self.merged:  # every sample is a token
            sl = sb
        if self.batch == 1:
            sb = 0
        return {f'{name}_sb': sb, f'{name}_sl': sl, f'{name}_sd': sd}

    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return dict(
            length=self.length, tiles=self.tiles, total=self.total, channels=self.channels,
            ROWS=self.rows, COLS=self.cols, WHOLE=self.whole, num_warps=self.warps,
        )

    def copied(self, tensors, pointers):
        """The tensors as the kernels take them, with their addresses."""
        tensors, pointers = [*tensors], [*pointers]
        for i in self.copies:
            tensors[i] = tensors[i].contiguous()
            pointers[i] = tensors[i].data_ptr()
        return tensors, pointers


def _places(**present) -> dict[str, Place | None]:
    """Pointers in the order of a program's tensors; what is None is absent."""
    return {
        name: None if one is None else Place(i) for i, (name, one) in enumerate(present.items())
    }


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Forward(_Pass):
    """One kind of forward pass; its tensors are x, branch, scale, factor, weight and bias."""

    def __init__(self, tensors, eps, dtype, rms, channels_first, gradients: bool):
        from . import triton_kernels as kernels

        x, branch, scale, factor, _, bias = tensors
        self.out = _New.shaped(x, dtype, channels_first)
        self.sum = None
        if branch is not None:
            self.sum = _New.shaped(x, promoted(x, branch, scale), channels_first)
        super().__init__(tensors, (1, 0), [self.out, self.sum], factor is not None)
        self.stats = (2, self.total) if gradients else None
        places = _places(
            p_x=True, p_branch=branch, p_scale=scale, p_factor=factor, p_weight=True, p_bias=bias,
            p_sum=self.sum, p_out=True, p_stats=self.stats,
        )
        constants = dict(EPS=eps, RMS=rms) | self.sizes()
        for name, steps in (
            ('x', self.steps[0]), ('branch', self.steps.get(1)),
            ('sum', self.sum and self.sum.steps), ('out', self.out.steps),
        ):
            constants |= self.strides(name, steps)
        grid = (self.batch * self.tiles,)
        self.program = Program(kernels, [Launch('add_norm_kernel', grid, places, constants)])

    def run(self, tensors, pointers) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Sum, norm, and what the backward pass needs beside the sum."""
        if self.copies:
            tensors, pointers = self.copied(tensors, pointers)
        x = tensors[0]
        total = None if self.sum is None else self.sum.empty(x)
        out = self.out.empty(x)
        stats = None
        if self.stats is not None:
            stats = x.new_empty(self.stats, dtype=torch.float32)
        self.program.run(
            (*tensors, total, out, stats),
            (*pointers, _address(total), out.data_ptr(), _address(stats)),
        )
        return total, out, stats


def _shared(scale, factor, x_dtype, branch_dtype) -> bool:
    """Whether nothing changes the gradient between the sum and the branch."""
    return scale is None and factor is None and x_dtype == branch_dtype


class Backward(_Pass):
    """One kind of backward pass.

    Its tensors are the gradients of norm and sum (None if nothing reads the sum), the sum, what the
    forward pass kept, branch (where the scale wants a gradient), scale, factor and weight.

    Args:
        tensors: as above.
        needs: whether x, branch, scale, weight and bias want gradients.
        dtypes: of x and branch.
        rms: see :func:`norm`.
        biased: whether there is a bias.
    """

    def __init__(self, tensors, needs, dtypes, rms: bool, biased: bool):
        from . import triton_kernels as kernels

        _, dsum, total, _, _, scale, factor, _ = tensors
        of_x, of_branch, self.of_scale, *of_norm = needs
        self.shared = of_branch and _shared(scale, factor, *dtypes)
        self.dx = _New.like(total, dtypes[0]) if of_x or self.shared else None
        self.dbranch = _New.like(total, dtypes[1]) if of_branch and not self.shared else None
        tensors = [*tensors]
        if not self.of_scale:
            tensors[4] = None
        super().__init__(tensors, (0, 1, 4, 2), [self.dx, self.dbranch], factor is not None)
        tiles = self.batch * self.tiles
        some = processors(total.device)
        # Enough programs to keep memory busy, few partial sums beside what is read.
        programs = max(some, min(4 * some, tiles // 4))
        repeat = -(-tiles // programs)
        programs = -(-tiles // repeat)
        self.biased, self.sums = biased, None
        if any(of_norm) or self.of_scale:
            self.sums = 1 + biased + self.of_scale, programs, self.channels
        places = _places(
            p_dout=True, p_dsum=dsum, p_sum=True, p_stats=True, p_branch=tensors[4], p_scale=scale,
            p_factor=factor, p_weight=True, p_dx=self.dx, p_dbranch=self.dbranch,
            p_dparameters=self.sums,
        )
        kept = self.rows if self.rows * self.cols <= 32 * _THREAD * self.warps else 1
        constants = self.sizes() | dict(
            RMS=rms, WITH_BIAS=biased, WITH_SCALE=self.of_scale, KEPT=kept, repeat=repeat,
            programs=programs,
        )
        for name, steps in (
            ('dout', self.steps[0]), ('dsum', self.steps.get(1)), ('sum', self.steps[2]),
            ('branch', self.steps.get(4)), ('dx', self.dx and self.dx.steps),
            ('dbranch', self.dbranch and self.dbranch.steps),
        ):
            constants |= self.strides(name, steps)
        one = Launch('add_norm_backward_kernel', (programs,), places, constants)
        self.program = Program(kernels, [one])

    def run(self, tensors, pointers) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x and branch, and (1 to 3, C) of weight, bias and scale."""
        if self.copies:
            tensors, pointers = self.copied(tensors, pointers)
        total = tensors[2]
        dx = None if self.dx is None else self.dx.empty(total)
        dbranch = None if self.dbranch is None else self.dbranch.empty(total)
        sums = None if self.sums is None else total.new_empty(self.sums, dtype=torch.float32)
        self.program.run(
            (*tensors, dx, dbranch, sums),
            (*pointers, _address(dx), _address(dbranch), _address(sums)),
        )
        return dx, dx if self.shared else dbranch, None if sums is None else sums.sum(1)


_CALLS: dict[tuple, '_Call'] = {}
_FORWARD: dict[tuple, Forward] = {}
_BACKWARD: dict[tuple, Backward] = {}


def forget() -> None:
    """Work every call out again, for tests that change how."""
    for known in (_CALLS, _FORWARD, _BACKWARD):
        known.clear()


class _Call:
    """One kind of call: its forward pass, and its backward passes by what reaches them."""

    def __init__(self, tensors, eps, dtype, rms, channels_first):
        x, branch, scale, _, weight, bias = tensors
        self.needs = tuple(
            t is not None and t.requires_grad for t in (x, branch, scale, weight, bias)
        )
        self.gradients = torch.is_grad_enabled() and any(self.needs)
        self.dtypes = x.dtype, None if branch is None else branch.dtype
        self.dtype, self.rms, self.biased = dtype, rms, bias is not None
        self.alone = branch is None
        self.forward = Forward(tensors, eps, dtype, rms, channels_first, self.gradients)
        self.backward: dict[tuple, Backward] = {}

    def __call__(self, tensors, pointers):
        """The norm, or sum and norm."""
        if self.gradients:
            return _apply(self, pointers, *tensors)
        total, out, _ = self.forward.run(tensors, pointers)
        return out if self.alone else (total, out)


class _AddNorm(torch.autograd.Function):
    """Sum and norm where nothing looks into them."""

    @staticmethod
    def forward(ctx, call: _Call, pointers, *tensors):
        x, branch, scale, factor, weight, _ = tensors
        total, out, stats = call.forward.run(tensors, pointers)
        branch = branch if call.needs[2] else None
        ctx.save_for_backward(x if call.alone else total, stats, branch, scale, factor, weight)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out if call.alone else (total, out)

    @staticmethod
    def backward(ctx, *grads):
        call = ctx.call
        dsum, dout = (None, *grads) if call.alone else grads
        if dout is None and dsum is None:
            return (None,) * 8
        kept = ctx.saved_tensors  # to be read once
        tensors = (_given(dout, kept[0], call.dtype), dsum, *kept)
        watched = torch.is_grad_enabled() or launch.intercepted()
        found = None if watched else launch.describe(tensors)
        if found is None:  # the operator says no to a second derivative
            return None, None, *_backward_operator(
                tensors, call.needs, call.dtypes, call.rms, call.biased
            )
        pointers, description = found
        key = tuple(description)
        one = call.backward.get(key)
        if one is None:
            one = Backward(tensors, call.needs, call.dtypes, call.rms, call.biased)
            remember(call.backward, key, one)
        return None, None, *_as_gradients(*one.run(tensors, pointers), call.needs, call.biased)


_apply = launch.fast_apply(_AddNorm)


def _given(dout: Tensor | None, total: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the norm, zero where nothing reads the norm."""
    return torch.zeros_like(total, dtype=dtype) if dout is None else dout


def _as_gradients(dx, dbranch, sums, needs, biased: bool):
    """Gradients in the order of the inputs."""
    dweight = dbias = dscale = None
    if sums is not None:
        dweight, *rest = sums.unbind()
        if biased:
            dbias, *rest = rest
        if rest:
            (dscale,) = rest
    grads = dx, dbranch, dscale, None, dweight, dbias
    wanted = *needs[:3], False, *needs[3:]
    return tuple(g if wish else None for g, wish in zip(grads, wanted, strict=True))


# The operators, where something looks into the norm. What is absent is empty in their results.


def _forward(*arguments):
    tensors, flags = arguments[:6], arguments[6:]
    one, pointers = find(_FORWARD, tensors, flags, lambda: Forward(tensors, *flags, True))
    total, out, stats = one.run(tensors, pointers)
    return tensors[0].new_empty(0) if total is None else total, out, stats


def _forward_fake(x, branch, scale, factor, weight, bias, eps, dtype, rms, channels_first):
    total = x.new_empty(0)
    if branch is not None:
        total = _New.shaped(x, promoted(x, branch, scale), channels_first).empty(x)
    out = _New.shaped(x, dtype, channels_first).empty(x)
    return total, out, x.new_empty(2, math.prod(x.shape[:-1]), dtype=torch.float32)


def _backward(*arguments):
    *tensors, needs, x_dtype, branch_dtype, rms, biased = arguments
    flags = tuple(needs), x_dtype, branch_dtype, rms, biased
    one, pointers = find(
        _BACKWARD, tensors, flags,
        lambda: Backward(tensors, needs, (x_dtype, branch_dtype), rms, biased),
    )
    dx, dbranch, sums = one.run(tensors, pointers)
    nothing = tensors[2].new_empty
    return (
        nothing(0) if dx is None else dx,
        nothing(0) if dbranch is None or one.shared else dbranch,  # results share no memory
        nothing(0, dtype=torch.float32) if sums is None else sums,
    )


def _backward_fake(dout, dsum, total, stats, branch, scale, factor, weight, needs, x_dtype,
                   branch_dtype, rms, biased):
    dx, dbranch = total.new_empty(0), total.new_empty(0)
    sums = total.new_empty(0, dtype=torch.float32)
    shared = needs[1] and _shared(scale, factor, x_dtype, branch_dtype)
    if needs[0] or shared:
        dx = _New.like(total, x_dtype).empty(total)
    if needs[1] and not shared:
        dbranch = _New.like(total, branch_dtype).empty(total)
    if any(needs[2:]):
        sums = sums.new_empty(1 + biased + needs[2], total.shape[-1])
    return dx, dbranch, sums


def _backward_operator(tensors, needs, dtypes, rms: bool, biased: bool):
    """The backward pass as an operator, which says no to a second derivative."""
    needs = [*needs]
    dx, dbranch, sums = torch.ops.mmhybrid.add_norm_backward(
        *tensors, needs, dtypes[0], dtypes[1] or dtypes[0], rms, biased
    )
    if needs[1] and _shared(tensors[5], tensors[6], *dtypes):
        dbranch = dx
    sums = sums if any(needs[2:]) else None
    return _as_gradients(dx, dbranch, sums, needs, biased)


def _setup_context(ctx, inputs, output):
    x, branch, scale, factor, weight, bias, _, ctx.dtype, ctx.rms, _ = inputs
    total, _, stats = output
    ctx.alone, ctx.biased = branch is None, bias is not None
    ctx.parameters = [None if t is None else t.dtype for t in (scale, None, weight, bias)]
    ctx.dtypes = x.dtype, None if ctx.alone else branch.dtype
    kept = branch if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(x if ctx.alone else total, stats, kept, scale, factor, weight)
    ctx.mark_non_differentiable(stats, *([total] if ctx.alone else []))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dsum, dout, _):
    dsum = None if ctx.alone else dsum
    if dsum is None and dout is None:
        return (None,) * 10
    x, branch, scale, _, weight, bias = ctx.needs_input_grad[:6]
    kept = ctx.saved_tensors  # to be read once
    tensors = (_given(dout, kept[0], ctx.dtype), dsum, *kept)
    needs = x, branch, scale, weight, bias
    dx, dbranch, *rest = _backward_operator(tensors, needs, ctx.dtypes, ctx.rms, ctx.biased)
    rest = (g if g is None else g.to(d) for g, d in zip(rest, ctx.parameters, strict=True))
    return dx, dbranch, *rest, None, None, None, None


_INPUTS = 'Tensor? branch, Tensor? scale, Tensor? factor, Tensor weight'
library.register(
    'add_norm',
    schema=(
        f'(Tensor x, {_INPUTS}, Tensor? bias, float eps, ScalarType dtype, bool rms, '
        'bool channels_first) -> (Tensor total, Tensor out, Tensor stats)'
    ),
    forward=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        f'(Tensor dout, Tensor? dsum, Tensor total, Tensor stats, {_INPUTS}, bool[] needs, '
        'ScalarType x_dtype, ScalarType branch_dtype, bool rms, bool biased) -> '
        '(Tensor dx, Tensor dbranch, Tensor dparameters)'
    ),
    backward=_backward,
    backward_fake=_backward_fake,
    refusal=(
        'the fused norm has a first derivative only, and a second one was asked for '
        '(create_graph=True); set MMHYBRID_FUSED_NORM=0, which leaves norms to PyTorch.'
    ),
)
