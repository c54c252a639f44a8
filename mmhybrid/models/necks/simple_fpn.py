"""A feature pyramid from the last map of a plain backbone.

From Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv
2203.16527), section 3 and appendix A.2.  Parameter names are those of detectron2's files.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmhybrid.layers import LayerNorm2d, MapPool
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

    Arguments are named as in the ViTDet configs of mmdet's projects, which build here too.

    Args:
        backbone_channel: channels C of the map; a multiple of 4.
        in_channels: (C / 4, C / 2, C, C), where given.
        out_channels: channels of all results.
        num_outs: number of maps, at least 4; from the fifth on every second pixel of the one
            before.
        norm_cfg: None, or ``dict(type='LN2d', eps=1e-6)``; the norm is always LayerNorm over
            channels.
        init_cfg: mmengine initialisation.

    Raises:
        TypeError: for an unknown argument.
        ValueError: for channels that cannot be divided by 4, fewer than 4 maps, another norm.
    """

    def __init__(self, backbone_channel: int, in_channels: Sequence[int] | None = None,
                 out_channels: int = 256, num_outs: int = 5, *, norm_cfg: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        channels = backbone_channel
        if channels < 4 or channels % 4:
            raise ValueError(f'got backbone_channel={channels}, expected a multiple of 4: the '
                             'finest map is made from a quarter of the channels')
        half, quarter = channels // 2, channels // 4
        if in_channels is not None and list(in_channels) != [quarter, half, channels, channels]:
            raise ValueError(f'got in_channels={in_channels} for backbone_channel={channels}, '
                             f'expected {[quarter, half, channels, channels]}; or leave it out')
        norm_cfg = dict(norm_cfg or dict(type='LN2d'))
        norm_cfg.pop('requires_grad', None)
        if norm_cfg.pop('type', None) != 'LN2d' or set(norm_cfg) - {'eps'}:
            raise ValueError(f"got norm_cfg={norm_cfg}, expected dict(type='LN2d', eps=1e-6)")
        norm_eps = norm_cfg.get('eps', 1e-6)
        if num_outs < 4:
            raise ValueError(f'got num_outs={num_outs}, expected at least 4')
        self.num_outs = num_outs
        ways = {
            2: (quarter, [nn.ConvTranspose2d(channels, half, 2, stride=2),
                          LayerNorm2d(half, eps=norm_eps), nn.GELU(),
                          nn.ConvTranspose2d(half, quarter, 2, stride=2)]),
            3: (half, [nn.ConvTranspose2d(channels, half, 2, stride=2)]),
            4: (channels, []),
            5: (channels, [MapPool(2)])}
        for level, (width, way) in ways.items():
            self.add_module(f'simfp_{level}', nn.Sequential(
                *way, ConvNorm(width, out_channels, 1, norm_eps),
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
