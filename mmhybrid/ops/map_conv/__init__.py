"""Depth-wise 3x3 convolution and SiLU on maps whose channels lie side by side."""

from .conv import map_conv, map_conv_reference

__all__ = ['map_conv', 'map_conv_reference']
