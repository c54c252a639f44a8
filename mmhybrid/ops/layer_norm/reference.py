"""Sum and norm in PyTorch: to read, to test against, and what runs where the kernels do not."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_reference(
    residual: Tensor, branch: Tensor, scale: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """residual + factor * (scale * branch), in the dtype to which PyTorch promotes.

    Args:
        residual: (B, ..., C).
        branch: like the residual.
        scale: per channel, (C,).
        factor: per sample, (B,).
    """
    if scale is not None:
        branch = scale * branch
    if factor is not None:
        branch = branch * factor.view(-1, *(1,) * (branch.dim() - 1)).to(branch.dtype)
    return residual + branch


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dtype: torch.dtype | None = None, rms: bool = False,
) -> Tensor:
    """Layer norm, or RMS norm, over the last axis in at least float32, then cast.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,), none for an RMS norm.
        eps: added to the variance, or to the mean square.
        dtype: of the result, None for that of x.
        rms: whether to divide by the root of the mean square and subtract no mean.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = dtype or x.dtype
    x, weight, bias = (t if t is None else t.to(wide) for t in (x, weight, bias))
    if rms:
        return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)
