"""VMamba for image classification: the form in which pretrained weights are published."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmhybrid.layers import token_linear
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.vmamba import VMamba

__all__ = ['PooledHead', 'VMambaClassifier']


class PooledHead:
    """Norm, global average pool and a linear layer on the last map of a four-stage backbone.

    To be named before the backbone in a list of base classes.
    """

    may_differ = r'outnorm\d\.'

    def add_head(self, num_classes: int) -> None:
        """Turn the output norm of the last stage into the classifier's."""
        norm = self.outnorm3
        del self.outnorm3
        self.classifier = nn.ModuleDict(
            dict(norm=norm, head=token_linear(self.out_channels[-1], num_classes)))

    def output_norm(self, stage: int) -> nn.Module:
        """Give the norm of the last stage."""
        return self.classifier['norm']

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        x, = super().forward(x)
        return self.classifier['head'](x.mean(dim=(2, 3)))


@MODELS.register_module()
@strict_arguments
class VMambaClassifier(PooledHead, VMamba):
    """VMamba with a norm, global average pool and a linear layer on stage 4.

    Takes images (B, in_channels, H, W) of any size and returns logits (B, num_classes).  Parameter
    names are those of the published classification weights.

    Args:
        arch: see :class:`VMamba`.
        num_classes: number of logits.
        drop_path_rate: see :class:`VMamba`.
        in_channels: see :class:`VMamba`.
        with_cp: see :class:`VMamba`.
        scan_backend: see :class:`VMamba`.
        lora: see :class:`VMamba`.
        init_cfg: see :class:`VMamba`.
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 num_classes: int = 1000,
                 drop_path_rate: float = 0.2,
                 in_channels: int = 3,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(
            arch, out_indices=(3,), drop_path_rate=drop_path_rate, in_channels=in_channels,
            with_cp=with_cp, scan_backend=scan_backend, lora=lora, init_cfg=init_cfg)
        self.add_head(num_classes)
