"""Vim for image classification: the form in which pretrained weights are published."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmhybrid.layers import RMSNorm, drop_path_or_identity, token_linear
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.vim import VimTrunk, checked_vim_architecture

__all__ = ['VimClassifier']


@MODELS.register_module()
@strict_arguments
class VimClassifier(VimTrunk):
    """Vim with a linear layer on its class token.

    Takes images (B, in_channels, H, W) of any size and returns logits (B, num_classes).  Parameter
    names are those of the published classification weights.  The first release is
    ``class_token='first', rope=True, divide=False``.

    Args:
        arch: see :class:`Vim`.
        num_classes: number of logits.
        img_size: see :class:`Vim`.
        stride: see :class:`Vim`.
        class_token: 'middle' or 'first'.
        rope: see :class:`Vim`.
        divide: see :class:`Vim`.
        drop_path_rate: see :class:`Vim`.
        in_channels: see :class:`Vim`.
        with_cp: see :class:`Vim`.
        scan_backend: see :class:`Vim`.
        lora: see :class:`Vim`.
        init_cfg: see :class:`Vim`.
    """

    may_differ = r'(rope|fpn\d)\.'

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 num_classes: int = 1000,
                 img_size: int | Sequence[int] = 224,
                 stride: int = 16,
                 class_token: str = 'middle',
                 rope: bool = False,
                 divide: bool = True,
                 drop_path_rate: float = 0.1,
                 in_channels: int = 3,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        if class_token not in ('middle', 'first'):
            raise ValueError(f"got class_token={class_token!r}, expected 'middle' or 'first': the "
                             'class token is what is classified')
        arch = checked_vim_architecture(arch)
        super().__init__(
            arch, img_size=img_size, stride=stride, class_token=class_token, rope=rope,
            divide=divide, drop_path_rate=drop_path_rate, in_channels=in_channels,
            frozen_stages=-1, with_cp=with_cp, scan_backend=scan_backend, lora=lora,
            init_cfg=init_cfg)
        self.norm_f = RMSNorm(arch['dim'], eps=1e-5, feeds_linear=True)
        self.head = token_linear(arch['dim'], num_classes)
        self.drop_path = drop_path_or_identity(drop_path_rate)
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Images to class tokens (B, C) after the final norm."""
        tokens, grid = self.embed(x)
        for stream, hidden in self.stream(tokens, grid, len(self.layers)):  # noqa: B007
            pass
        final = stream + self.drop_path(hidden)
        return self.norm_f(torch.select(final, 1, self.class_index(grid)))

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit position embedding and rotary tables of a file."""
        return self.adapt_positions(state_dict, self.class_position)
