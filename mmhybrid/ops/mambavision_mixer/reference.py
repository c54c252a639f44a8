"""What the kernel before the scan computes, in PyTorch: to read, and to test against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prescan_reference(xz: Tensor, w_conv_x: Tensor, w_conv_z: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve each channel over the tokens, then SiLU.

    Args:
        xz: (B, L, C).
        w_conv_x: filters of the left half of the channels, (C / 2, K) with odd K.
        w_conv_z: filters of the right half.

    Returns:
        Both halves, (B, L, C / 2) each, in xz's dtype; differentiable.
    """
    weight = torch.cat([w_conv_x, w_conv_z]).unsqueeze(1).to(xz.dtype)
    out = F.conv1d(
        xz.transpose(1, 2), weight, padding=weight.shape[-1] // 2, groups=len(weight)
    )
    return F.silu(out).transpose(1, 2).chunk(2, dim=-1)
