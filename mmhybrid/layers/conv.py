"""Convolutional parts of hierarchical backbones: stem, residual block, downsampling.

Weights lie with channels last in memory, so whatever comes in, maps go from one convolution to the
next with channels last: libraries compute them so, and their tokens are a view.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn
from .drop_path import drop_path_or_identity, dropped

__all__ = ['ConvBlock', 'ConvStem', 'Downsample']


class ConvStem(nn.Module):
    """Two strided 3x3 convolutions, each with BatchNorm (eps 1e-4) and ReLU.

    A side of n pixels becomes ceil(ceil(n / 2) / 2).

    Args:
        in_channels: channels of the image.
        width: channels between the convolutions.
        out_channels: channels of the result.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width, eps=1e-4),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-4),
            nn.ReLU(inplace=True))
        _channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) to map (B, out_channels, ~H/4, ~W/4)."""
        layers = self.conv_down
        if not _foldable(x, layers[:2], layers[3:5]):
            return layers(x)
        for i in (0, 3):
            x = onednn.convolution(x, layers[i], layers[i + 1], 'relu')
        return x


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions with BatchNorm and a tanh GELU in between.

    Args:
        dim: C, channels in and out.
        drop_path: stochastic depth rate of this block.
    """

    def __init__(self, dim: int, drop_path: float = 0.):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = drop_path_or_identity(drop_path)
        _channels_last(self)

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """Shape (B, C, H, W) in and out; ``drop`` are factors (B,) drawn before."""
        if drop is None and not self.drop_path.training and _foldable(
                x, (self.conv1, self.norm1), (self.conv2, self.norm2)):
            y = onednn.convolution(x, self.conv1, self.norm1, 'gelu_tanh')
            return onednn.convolution(y, self.conv2, self.norm2, residual=x)
        y = F.gelu(self.norm1(self.conv1(x)), approximate='tanh')
        return x + dropped(self.norm2(self.conv2(y)), self.drop_path if drop is None else drop)


class Downsample(nn.Module):
    """One strided 3x3 convolution without bias or norm.

    A side of n pixels becomes ceil(n / 2).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.reduction = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False))
        _channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ~H/2, ~W/2)."""
        return self.reduction(x)


def _channels_last(module: nn.Module) -> None:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(weight)


def _foldable(x: Tensor, *pairs: Sequence[nn.Module]) -> bool:
    """Whether oneDNN may compute these convolutions with their norms as part of the weights."""
    return all(type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and not norm.training
               and norm.running_var is not None and onednn.takes(x, conv, norm)
               for conv, norm in pairs)
