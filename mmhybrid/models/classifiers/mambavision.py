"""MambaVision for image classification: the form in which pretrained weights are published."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmhybrid.layers import token_linear
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.mambavision import MambaVision

__all__ = ['MambaVisionClassifier']

# Rates of the published training; an architecture given as a dictionary gets that of 'tiny'.
_DROP_PATH_RATES = dict(base=0.3, large=0.3, large2=0.3, large3=0.5)


@MODELS.register_module()
@strict_arguments
class MambaVisionClassifier(MambaVision):
    """MambaVision with BatchNorm, global average pool and a linear layer on stage 4.

    Takes images (B, in_channels, H, W) of any size and returns logits (B, num_classes).  Parameter
    names are those of the published classification weights.

    Args:
        arch: see :class:`MambaVision`.
        num_classes: number of logits.
        window_size: see :class:`MambaVision`.
        windows: see :class:`MambaVision`.
        drop_path_rate: stochastic depth rate of the last block; None for that of the published
            training (0.2, base to large2 0.3, large3 0.5).
        layer_scale: see :class:`MambaVision`.
        in_channels: see :class:`MambaVision`.
        with_cp: see :class:`MambaVision`.
        scan_backend: see :class:`MambaVision`.
        causal_mixer: see :class:`MambaVision`.
        mixer_branch: see :class:`MambaVision`.
        pattern: see :class:`MambaVision`.
        lora: see :class:`MambaVision`.
        init_cfg: see :class:`MambaVision`.
    """

    may_differ = r'outnorm\d\.'

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 num_classes: int = 1000,
                 window_size: Sequence[int] | None = None,
                 windows: str = 'published',
                 drop_path_rate: float | None = None,
                 layer_scale: float | str | None = 'arch',
                 in_channels: int = 3,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 causal_mixer: bool = False,
                 mixer_branch: str = 'concat',
                 pattern: str = 'last-half',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        if drop_path_rate is None:
            name = arch if isinstance(arch, str) else 'tiny'
            drop_path_rate = _DROP_PATH_RATES.get(name, 0.2)
        super().__init__(
            arch, window_size=window_size, windows=windows, out_indices=(3,),
            drop_path_rate=drop_path_rate, layer_scale=layer_scale, in_channels=in_channels,
            with_cp=with_cp, out_norm=None, scan_backend=scan_backend, causal_mixer=causal_mixer,
            mixer_branch=mixer_branch, pattern=pattern, lora=lora,
            init_cfg=init_cfg)
        self.norm = nn.BatchNorm2d(self.out_channels[0])
        self.head = token_linear(self.out_channels[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        x, = super().forward(x)
        return self.head(self.norm(x).mean(dim=(2, 3)))
