"""The published configs' spelling of Vim's segmentation backbone."""
from __future__ import annotations

from collections.abc import Sequence

from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.vim import Vim
from .common import fixed, ignores, pretrained_init

__all__ = ['VisionMambaSeg']

_LAST = {'none': 'none', 'add': 'add', 'add & norm': 'add_norm'}


@MODELS.register_module()
@strict_arguments
@ignores('final_pool_type', 'use_checkpoint', 'num_classes', 'init_cfg', instead='Vim')
class VisionMambaSeg(Vim):
    """Vim with the arguments of the released segmentation configs (mmseg 0.x dictionaries).

    As in the published class the class token is never part of the sequence; with ``if_cls_token``
    a file's position embedding loses row 0, which is wrong for files with a middle class token.
    One warning names the settings that the published class ignores.  For new configs use
    :class:`Vim`, where every setting counts.

    Args:
        img_size: side of the images for which the position embedding is built.
        patch_size: 16.
        stride: pixels between patches.
        in_chans: channels of the images.
        embed_dim: token width.
        depth: number of blocks.
        d_state: states per channel.
        out_indices: blocks to return.
        drop_path_rate: stochastic depth rate.
        if_fpn: whether to return a pyramid.
        use_residual_as_feature: return the stream after a block instead of its contribution.
        last_layer_process: 'none', 'add' or 'add & norm'.
        if_rope, if_rope_residual: both or none.
        if_divide_out: halve the sum of both directions.
        if_cls_token: see above.
        use_middle_cls_token, if_abs_pos_embed, rms_norm: True, where they are given.
        bimamba_type: 'v2'.
        fused_add_norm, residual_in_fp32: choices of implementation; the result is the same.
        pretrained: checkpoint file, loaded by ``init_weights``, not while building.

    What the decorator lists is accepted without effect.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value that no released model uses.
    """

    def __init__(self, *, img_size: int | Sequence[int] = 224, patch_size: int = 16,
                 stride: int = 16, in_chans: int = 3, embed_dim: int = 192, depth: int = 24,
                 d_state: int = 16, out_indices: Sequence[int] = (3, 5, 7, 11),
                 drop_path_rate: float = 0.1, if_fpn: bool = True,
                 use_residual_as_feature: bool = False, last_layer_process: str = 'none',
                 if_rope: bool = False, if_rope_residual: bool = False, if_divide_out: bool = True,
                 if_cls_token: bool = True, use_middle_cls_token: bool = True,
                 if_abs_pos_embed: bool = True, rms_norm: bool = True, bimamba_type: str = 'v2',
                 fused_add_norm: bool = True, residual_in_fp32: bool = True,
                 pretrained: str | None = None):
        fixed('patch_size', patch_size, 16)
        fixed('if_abs_pos_embed', if_abs_pos_embed, True)
        fixed('rms_norm', rms_norm, True)
        fixed('bimamba_type', bimamba_type, 'v2')
        fixed('if_rope_residual', if_rope_residual, if_rope)
        fixed('last_layer_process', last_layer_process, *_LAST)
        acts = use_residual_as_feature and out_indices[-1] == depth - 1
        super().__init__(
            dict(dim=embed_dim, depth=depth, state_dim=d_state), img_size=img_size, stride=stride,
            out_indices=out_indices, feature='residual' if use_residual_as_feature else 'mixer',
            last=_LAST[last_layer_process] if acts else None, pyramid=if_fpn, rope=if_rope,
            divide=if_divide_out, dropped_row='first' if if_cls_token else 'middle',
            drop_path_rate=drop_path_rate, in_channels=in_chans,
            init_cfg=pretrained_init(pretrained))
        if not acts and last_layer_process != 'none':
            self.without_effect = dict(last_layer_process=last_layer_process)
