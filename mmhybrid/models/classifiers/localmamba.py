"""LocalMamba for image classification: the form in which pretrained weights are published."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmhybrid.layers import LayerNorm, RMSNorm, add_norm, drop_path_or_identity, token_linear
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.localvim import LocalVimTrunk
from ..backbones.localvmamba import LocalVMamba
from .vmamba import PooledHead

__all__ = ['LocalVMambaClassifier', 'LocalVimClassifier']


@MODELS.register_module()
@strict_arguments
class LocalVMambaClassifier(PooledHead, LocalVMamba):
    """LocalVMamba with a norm, global average pool and a linear layer on stage 4.

    Takes images (B, in_channels, H, W) of any size and returns logits (B, num_classes).  Parameter
    names are those of the published classification weights.

    Args:
        arch: see :class:`LocalVMamba`.
        num_classes: number of logits.
        directions: see :class:`LocalVMamba`.
        v_restore: see :class:`LocalVMamba`.
        drop_path_rate: see :class:`LocalVMamba`.
        in_channels: see :class:`LocalVMamba`.
        with_cp: see :class:`LocalVMamba`.
        scan_backend: see :class:`LocalVMamba`.
        attention: see :class:`LocalVMamba`.
        lora: see :class:`LocalVMamba`.
        init_cfg: see :class:`LocalVMamba`.
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 num_classes: int = 1000,
                 directions: str | Sequence[Sequence[str]] | None = 'searched',
                 v_restore: str = 'exact',
                 drop_path_rate: float = 0.2,
                 in_channels: int = 3,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 attention: str = 'channel',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(
            arch, directions=directions, v_restore=v_restore, out_indices=(3,),
            drop_path_rate=drop_path_rate, in_channels=in_channels, with_cp=with_cp,
            scan_backend=scan_backend, attention=attention, lora=lora, init_cfg=init_cfg)
        self.add_head(num_classes)


@MODELS.register_module()
@strict_arguments
class LocalVimClassifier(LocalVimTrunk):
    """LocalVim with a linear layer on the mean of its tokens, or on a middle class token.

    Takes images (B, in_channels, H, W) of any size and returns logits (B, num_classes).  Parameter
    names are those of the published classification weights.

    Args:
        arch: see :class:`LocalVim`.
        num_classes: number of logits.
        directions: see :class:`LocalVim`.  The published factory of the small network ends up
            with 'unsearched'.
        v_restore: see :class:`LocalVim`.
        norm: see :class:`LocalVim`.
        img_size: see :class:`LocalVim`.
        class_token: whether there is one in the middle of the sequence.
        rope: see :class:`LocalVim`; None for the published choice: with a class token none.
        drop_path_rate: see :class:`LocalVim`.
        in_channels: see :class:`LocalVim`.
        with_cp: see :class:`LocalVim`.
        scan_backend: see :class:`LocalVim`.
        attention: see :class:`LocalVim`.
        lora: see :class:`LocalVim`.
        init_cfg: see :class:`LocalVim`.
    """

    may_differ = r'(rope|outnorm_\d+)\.|layers\.\d+\.norm\.bias'

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 num_classes: int = 1000,
                 directions: str | Sequence[Sequence[str]] | None = 'searched',
                 v_restore: str = 'exact',
                 norm: str = 'rms',
                 img_size: int | Sequence[int] = 224,
                 class_token: bool = False,
                 rope: bool | None = None,
                 drop_path_rate: float = 0.1,
                 in_channels: int = 3,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 attention: str = 'channel',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(
            arch, directions=directions, v_restore=v_restore, norm=norm, img_size=img_size,
            class_token='middle' if class_token else None,
            rope=not class_token if rope is None else rope, drop_path_rate=drop_path_rate,
            in_channels=in_channels, frozen_stages=-1, with_cp=with_cp, scan_backend=scan_backend,
            attention=attention, lora=lora, init_cfg=init_cfg)
        norms = {'ln': LayerNorm, 'rms': RMSNorm}
        self.norm_f = norms[norm](self.dim, eps=1e-5)
        self.head = token_linear(self.dim, num_classes)
        self.drop_path = drop_path_or_identity(drop_path_rate)
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes)."""
        tokens, grid = self.embed(x)
        for stream, hidden in self.stream(tokens, grid, len(self.layers)):  # noqa: B007
            pass
        _, tokens = add_norm(stream, hidden, self.norm_f, drop=self.drop_path)
        index = self.class_index(grid)
        return self.head(tokens.mean(dim=1) if index is None else tokens[:, index])
