"""Norms of tokens and maps, alone and together with the residual sum before them.

    LayerNorm(dim, eps=1e-5, feeds_linear=False)(x) -> normed
    RMSNorm(dim, eps=1e-5, feeds_linear=False)(x) -> normed
    add_norm(residual, branch, norm, scale=None, drop=None) -> (sum, normed)

On a GPU where Triton runs, both are one kernel (:mod:`mmhybrid.ops.layer_norm`).  Elsewhere they
are what PyTorch makes of the same sum and norm.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.ops import layer_norm as fused
from mmhybrid.ops import triton_support

from .drop_path import DropPath

__all__ = ['LayerNorm', 'LayerNorm2d', 'PortableSyncBatchNorm', 'RMSNorm', 'add_norm']


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis.

    Args:
        dim: C.
        eps: added to the variance.
        feeds_linear: whether linear layers or convolutions alone read the result.  Under autocast
            on a GPU the norm then rounds to their dtype itself; they see the same numbers, and
            nothing has to cast.  Otherwise it is float32 there, as PyTorch's is.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, feeds_linear: bool = False):
        super().__init__(dim, eps=eps)
        self.feeds_linear = feeds_linear

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, ..., C) in and out."""
        if _fits(self, x):
            return fused.norm(x, self.weight, self.bias, self.eps, _dtype_of(self, x.dtype, x))
        return _narrowed(self, super().forward(x))


class RMSNorm(nn.RMSNorm):
    """Norm by the root of the mean square over the last axis.

    Args:
        dim: C.
        eps: added to the mean square.
        feeds_linear: see :class:`LayerNorm`.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, feeds_linear: bool = False):
        super().__init__(dim, eps=eps)
        self.feeds_linear = feeds_linear

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, ..., C) in and out."""
        if _fits(self, x):
            dtype = _dtype_of(self, x.dtype, x)
            return fused.norm(x, self.weight, None, self.eps, dtype, rms=True)
        return _narrowed(self, super().forward(x))


def add_norm(residual: Tensor, branch: Tensor, norm: LayerNorm | RMSNorm,
             scale: Tensor | None = None, drop: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """residual + drop(scale * branch), and the norm of this sum.

    Args:
        residual: (B, ..., C).
        branch: like the residual.
        norm: over the last axis.
        scale: (C,), a factor of each channel.
        drop: a :class:`DropPath` or ``nn.Identity``.

    Returns:
        (sum, normed): the sum in the dtype to which PyTorch promotes its parts, the norm as the
        module alone would give it.
    """
    dropped = isinstance(drop, DropPath)
    if _hooked(norm, drop) or not (dropped or drop is None or type(drop) is nn.Identity) or (
            not _fits(norm, residual, branch, scale)):
        branch = branch if scale is None else scale * branch
        total = residual + (branch if drop is None else drop(branch))
        return total, norm(total)
    factor = drop.factor(branch) if dropped and drop.training else None
    parts = (residual, branch) if scale is None else (residual, branch, scale)
    dtype = _dtype_of(norm, _promoted(*parts), residual)
    rms = isinstance(norm, RMSNorm)
    return fused.add_norm(residual, branch, norm.weight, None if rms else norm.bias, norm.eps,
                          dtype, scale, factor, rms)


def _promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _hooked(*modules: nn.Module | None) -> bool:
    """Whether somebody wants to see calls of modules."""
    return any(
        m is not None and bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                               or m._backward_pre_hooks)
        for m in modules)


def _fits(norm: nn.Module, x: Tensor, *more: Tensor | None) -> bool:
    """Whether the kernels take a call; a compiler fuses the operations of PyTorch by itself."""
    if not isinstance(norm, (LayerNorm, RMSNorm)) or torch.compiler.is_compiling():
        return False
    if triton_support.not_default_reason() is not None or norm.weight is None:
        return False
    return fused.unsupported_reason(x, norm.weight, *more) is None


def _dtype_of(norm: LayerNorm | RMSNorm, dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """Dtype of what a norm of ``dtype`` on the device of x gives."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return dtype
    if norm.feeds_linear:
        return torch.get_autocast_dtype(kind)
    return dtype if isinstance(norm, RMSNorm) else torch.float32


def _narrowed(norm: LayerNorm | RMSNorm, y: Tensor) -> Tensor:
    """What the kernels would give, where a compiler sees the cast."""
    if torch.compiler.is_compiling() and y.is_cuda:
        return y.to(_dtype_of(norm, y.dtype, y))
    return y


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channel axis of a map.

    Input and output: (B, C, H, W), any memory format; the output is contiguous NCHW, which is what
    necks and RoI operators want.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channel vector."""
        x = x.permute(0, 2, 3, 1)  # B H W C: the normalised axis comes last
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class PortableSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm that is an ordinary BatchNorm on devices without synchronisation.

    Torch's own refuses tensors on a CPU, also when there is nothing to synchronise.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, ...) in and out."""
        return super().forward(x) if x.is_cuda else nn.BatchNorm2d.forward(self, x)
