"""Norms of tokens and maps, alone and together with the residual sum before them.

    LayerNorm(C, eps=1e-5, feeds_linear=False)(x) -> normed                          (B, ..., C)
    RMSNorm(C, eps=1e-5, feeds_linear=False)(x) -> normed                            (B, ..., C)
    LayerNorm2d(C, eps=1e-5, feeds_linear=False, channels_last=False)(x) -> normed   (B, C, H, W)
    add_norm(residual, branch, norm, scale=None, drop=None) -> (sum, normed)

On a GPU where Triton runs, each is one kernel (:mod:`mmhybrid.ops.layer_norm`).  Elsewhere, and
where a compiler fuses by itself, it is what PyTorch makes of the same sum and norm.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops import layer_norm as fused
from mmhybrid.ops import triton_support

from .drop_path import DropPath, dropped

__all__ = ['LayerNorm', 'LayerNorm2d', 'PortableSyncBatchNorm', 'RMSNorm', 'add_norm']


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis.

    Args:
        normalized_shape: number of channels C.
        eps: added to the variance.
        feeds_linear: whether linear layers or convolutions alone read the result.  Under autocast
            on a GPU the norm then rounds to their dtype itself; they see the same numbers, and
            nothing has to cast.  Otherwise it is float32 there, as PyTorch's is.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, feeds_linear: bool = False):
        super().__init__(normalized_shape, eps=eps)
        self.feeds_linear = feeds_linear

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, ..., C) in and out; the result is contiguous."""
        if _fits(self, x):
            return fused.norm(x, self.weight, self.bias, self.eps, _dtype_of(self, x.dtype, x))
        return _narrowed(self, super().forward(x))


class RMSNorm(nn.RMSNorm):
    """Norm by the root of the mean square over the last axis.

    Args:
        normalized_shape: number of channels C.
        eps: added to the mean square.
        feeds_linear: see :class:`LayerNorm`.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, feeds_linear: bool = False):
        super().__init__(normalized_shape, eps=eps)
        self.feeds_linear = feeds_linear

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, ..., C) in and out; the result is contiguous."""
        if _fits(self, x):
            dtype = _dtype_of(self, x.dtype, x)
            return fused.norm(x, self.weight, None, self.eps, dtype, rms=True)
        return _narrowed(self, super().forward(x))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channel axis of a map.

    Input and output: (B, C, H, W), any memory format; the output is contiguous NCHW, which is what
    necks and RoI operators want.

    Args:
        normalized_shape: number of channels C.
        eps: added to the variance.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias beside it.
        feeds_linear: see :class:`LayerNorm`.
        channels_last: whether the output lies in this memory format instead.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True,
                 bias: bool = True, *, feeds_linear: bool = False, channels_last: bool = False):
        super().__init__(normalized_shape, eps, elementwise_affine, bias)
        self.feeds_linear, self.channels_last = feeds_linear, channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channel vector."""
        x = _pixels(x)
        if _fits(self, x):
            dtype = _dtype_of(self, x.dtype, x)
            return _map(fused.norm(x, self.weight, self.bias, self.eps, dtype,
                                   channels_first=not self.channels_last))
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        x = _map(_narrowed(self, x))
        return x if self.channels_last else x.contiguous()


def add_norm(residual: Tensor, branch: Tensor, norm: nn.Module, scale: Tensor | None = None,
             drop: nn.Module | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """residual + drop(scale * branch), and the norm of this sum.

    Args:
        residual: (B, ..., C); (B, C, H, W) if the norm is a :class:`LayerNorm2d`.
        branch: like the residual.
        norm: one of the three norms above; any other module is called as it is.
        scale: (C,), a factor of each channel.
        drop: a :class:`DropPath`, ``nn.Identity``, or factors (B,) drawn before.

    Returns:
        (sum, normed): the sum in the dtype to which PyTorch promotes its parts, the norm as the
        module alone would give it.  With kernels both lie in memory as the module's output does.
    """
    of_map = isinstance(norm, LayerNorm2d)
    rows = (_pixels(residual), _pixels(branch)) if of_map else (residual, branch)
    module = drop if isinstance(drop, nn.Module) else None
    if _hooked(norm, module) or not (
            isinstance(module, (DropPath, nn.Identity, type(None))) and _fits(norm, *rows, scale)):
        if scale is not None:
            branch = (scale[:, None, None] if of_map else scale) * branch
        total = residual + dropped(branch, drop)
        return total, norm(total)
    factor = drop if module is None else None
    if isinstance(module, DropPath) and module.training:
        factor = module.factor(branch)
    dtype = _dtype_of(norm, fused.promoted(*rows, scale), residual)
    rms = isinstance(norm, RMSNorm)
    pair = fused.add_norm(*rows, norm.weight, None if rms else norm.bias, norm.eps, dtype, scale,
                          factor, rms, of_map and not norm.channels_last)
    return tuple(map(_map, pair)) if of_map else pair


def _pixels(x: Tensor) -> Tensor:
    """View of a map whose last axis are the channels."""
    return x.permute(0, 2, 3, 1)


def _map(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _hooked(*modules: nn.Module | None) -> bool:
    """Whether somebody wants to see calls of modules."""
    return any(
        m is not None and bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                               or m._backward_pre_hooks)
        for m in modules)


def _fits(norm: nn.Module, x: Tensor, *more: Tensor | None) -> bool:
    """Whether the kernels take a call; a compiler fuses the operations of PyTorch by itself."""
    if not isinstance(norm, (LayerNorm, RMSNorm, LayerNorm2d)) or torch.compiler.is_compiling():
        return False
    if norm.weight is None or triton_support.not_default_reason() is not None:
        return False
    return fused.unsupported_reason(x, norm.weight, *more) is None


def _dtype_of(norm: nn.Module, dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """Dtype of what a norm of ``dtype`` on the device of x gives."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return dtype
    if norm.feeds_linear:
        return torch.get_autocast_dtype(kind)
    return dtype if isinstance(norm, RMSNorm) else torch.float32


def _narrowed(norm: nn.Module, y: Tensor) -> Tensor:
    """What the kernels would give, where a compiler sees the cast."""
    if torch.compiler.is_compiling() and y.is_cuda:
        return y.to(_dtype_of(norm, y.dtype, y))
    return y


class PortableSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm that is an ordinary BatchNorm on devices without synchronisation.

    Torch's own refuses tensors on a CPU, also when there is nothing to synchronise.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, ...) in and out."""
        return super().forward(x) if x.is_cuda else nn.BatchNorm2d.forward(self, x)
