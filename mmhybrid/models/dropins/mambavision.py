"""The published configs' spelling of the backbone, so that they build by changing one import."""
from __future__ import annotations

from collections.abc import Sequence

from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.mambavision import MambaVision
from .common import ignores, pretrained_init

__all__ = ['MM_mamba_vision']

_DROP_PATH_RATE = 0.2
_WITHOUT_EFFECT = (
    'drop_path_rate',
    # from the ResNet base of detection
    'depth', 'num_stages', 'frozen_stages', 'norm_cfg', 'norm_eval', 'style', 'init_cfg',
    # from the Swin base of segmentation
    'pretrain_img_size', 'embed_dims', 'patch_size', 'strides', 'qkv_bias', 'qk_scale',
    'patch_norm', 'drop_rate', 'attn_drop_rate', 'use_abs_pos_embed', 'act_cfg')


@MODELS.register_module()
@strict_arguments
@ignores(*_WITHOUT_EFFECT, instead='MambaVision',
         remark=f' Stochastic depth is {_DROP_PATH_RATE}.')
class MM_mamba_vision(MambaVision):
    """MambaVision with the arguments that released detection and segmentation configs end up with.

    Behaves as the published class: stochastic depth is 0.2 whatever the config says, and what the
    configs inherit from ResNet and Swin bases does nothing.  One warning names each such setting.
    For new configs use :class:`MambaVision`, where every setting counts.

    Args:
        dim: channels of stage 1; doubled by each stage.
        in_dim: channels inside the stem.
        depths: blocks per stage.
        num_heads: attention heads per stage; the first two are unused.
        window_size: window sides per stage; the first two are unused.
        mlp_ratio: hidden width of MLPs over their input.
        out_indices: stages to return.
        norm_layer: norm of the outputs, 'ln2d' or 'bn'.
        layer_scale: initial per-channel factor of stages 3 and 4; None for none.
        pretrained: checkpoint file, loaded by ``init_weights``, not while building.

    What the decorator lists is accepted without effect.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value out of range, and for ``norm_layer='ln'``.
    """

    def __init__(self, *, dim: int, in_dim: int, depths: Sequence[int], num_heads: Sequence[int],
                 window_size: Sequence[int], mlp_ratio: float = 4,
                 out_indices: Sequence[int] = (0, 1, 2, 3), norm_layer: str = 'ln2d',
                 layer_scale: float | None = None, pretrained: str | None = None):
        if norm_layer == 'ln':
            raise ValueError("got norm_layer='ln', which normalises over the map's width and so "
                             "fits one input size only; use 'ln2d', as all released weights do")
        if norm_layer not in ('ln2d', 'bn'):
            raise ValueError(f"got norm_layer={norm_layer!r}, expected 'ln2d' or 'bn'")
        super().__init__(
            dict(dim=dim, stem_width=in_dim, depths=depths, num_heads=num_heads,
                 window_size=window_size, mlp_ratio=mlp_ratio, layer_scale=layer_scale),
            out_indices=out_indices,
            drop_path_rate=_DROP_PATH_RATE,
            out_norm=norm_layer,
            init_cfg=pretrained_init(pretrained))
