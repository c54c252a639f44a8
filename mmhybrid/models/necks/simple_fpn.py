"""A feature pyramid from the last map of a plain backbone.

From Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv
2203.16527), section 3 and appendix A.2.  Parameter names are those of detectron2's files.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmhybrid.layers import LayerNorm2d
from mmhybrid.layers.pool import MapPool
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments

__all__ = ['SimpleFPN']

# For the norm_cfg of heads, which have the same norm in ViTDet.
MODELS.register_module(name='LN2d', module=LayerNorm2d)


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then LayerNorm over channels; no activation."""

    def __init__(self, in_channels: int, out_channels: int, size: int, eps: float):
        super().__init__(in_channels, out_channels, size, padding=size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels, eps=eps)
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return self.norm(super().forward(x))


@MODELS.register_module()
@strict_arguments
class SimpleFPN(BaseModule):
    """Maps at strides 4, 8, 16, 32 and so on from one map at stride 16.

    Args:
        in_channels: channels C of the map; a multiple of 4.
        out_channels: channels of all results.
        num_outs: number of maps, at least 4; from the fifth on every second pixel of the one
            before.
        norm_eps: epsilon of the norms.
        init_cfg: mmengine initialisation.

    Raises:
        TypeError: for an unknown argument.
        ValueError: for channels that cannot be divided by 4, or fewer than 4 maps.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, *, num_outs: int = 5,
                 norm_eps: float = 1e-6, init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        if in_channels < 4 or in_channels % 4:
            raise ValueError(f'got in_channels={in_channels}, expected a multiple of 4: the finest '
                             'map is made from a quarter of the channels')
        if num_outs < 4:
            raise ValueError(f'got num_outs={num_outs}, expected at least 4')
        self.num_outs = num_outs
        half, quarter = in_channels // 2, in_channels // 4
        ways = {
            2: (quarter, [nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                          LayerNorm2d(half, eps=norm_eps), nn.GELU(),
                          nn.ConvTranspose2d(half, quarter, 2, stride=2)]),
            3: (half, [nn.ConvTranspose2d(in_channels, half, 2, stride=2)]),
            4: (in_channels, []),
            5: (in_channels, [MapPool(2)])}
        for level, (channels, way) in ways.items():
            self.add_module(f'simfp_{level}', nn.Sequential(
                *way, ConvNorm(channels, out_channels, 1, norm_eps),
                ConvNorm(out_channels, out_channels, 3, norm_eps)))

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the pyramid.

        Args:
            inputs: map (B, C, H, W), or several of which the last is used.

        Returns:
            ``num_outs`` maps (B, out_channels, 4H, 4W), (.., 2H, 2W), (.., H, W), (.., H/2, W/2)
            and so on.
        """
        x = inputs if isinstance(inputs, Tensor) else inputs[-1]
        maps = [getattr(self, f'simfp_{level}')(x) for level in (2, 3, 4, 5)]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)
