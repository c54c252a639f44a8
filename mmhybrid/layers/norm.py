"""Layer normalisation of feature maps."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['LayerNorm2d', 'PortableSyncBatchNorm']


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
