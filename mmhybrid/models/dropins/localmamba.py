"""The published configs' spelling of LocalMamba, so that they build by changing one import."""
from __future__ import annotations

from collections.abc import Sequence

from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.localvim import LocalVim
from ..backbones.localvmamba import LocalVMamba
from .common import SWIN_BASE, fixed, ignores, pretrained_init
from .vmamba import parse_forward_type, stage_width

__all__ = ['MM_LocalVSSM', 'MM_LocalVim']


@MODELS.register_module()
@strict_arguments
@ignores(*SWIN_BASE, instead='LocalVMamba')
class MM_LocalVSSM(LocalVMamba):
    """LocalVMamba with the arguments that released configs end up with.

    What the configs inherit from Swin bases does nothing, as in the published class; one warning
    names each such setting.  For new configs use :class:`LocalVMamba`, where every setting counts.
    Column scans are put back as the published code does it, on maps that are not square on wrong
    pixels; ``v_restore='exact'`` puts them right.

    Args:
        directions: one list of names per block.
        dims: channels of stage 1, or of all four, each twice the one before.
        depths: blocks per stage.
        ssm_d_state: states per channel.
        ssm_ratio: inner width of the mixer over its input.
        ssm_dt_rank: rank of the step; 'auto' for ceil(channels / 16).
        ssm_conv: side of the depth-wise convolution; 3.
        ssm_conv_bias: whether it has a bias.
        ssm_act_layer: activation of the mixer; 'silu'.
        ssm_init: how the scan is initialised; 'v0'.
        forward_type: form of the mixer, as in :class:`MM_VSSM`; it has a gate.
        mlp_ratio: hidden width of the MLPs over their input; 0 for none.
        mlp_act_layer: activation of the MLPs; 'gelu'.
        drop_path_rate: stochastic depth rate of the last block.
        patch_norm: True.
        norm_layer: 'ln'.
        downsample_version: 'v1', 'v2' or 'v3'.
        patchembed_version: 'v1' or 'v2'.
        out_indices: stages to return.
        pretrained: checkpoint file, loaded by ``init_weights``, not while building; '' for none.
        v_restore: see above.

    What :data:`SWIN_BASE` lists is accepted without effect.

    Raises:
        TypeError: for an unknown argument, a missing ``directions``, a value of the wrong type.
        ValueError: for a value that no released model uses.
    """

    def __init__(self, *, directions: Sequence[Sequence[str]],
                 dims: int | Sequence[int] = (96, 192, 384, 768),
                 depths: Sequence[int] = (2, 2, 9, 2), ssm_d_state: int = 16,
                 ssm_ratio: float = 2.0, ssm_dt_rank: int | str = 'auto', ssm_conv: int = 3,
                 ssm_conv_bias: bool = True, ssm_act_layer: str = 'silu', ssm_init: str = 'v0',
                 forward_type: str = 'v2', mlp_ratio: float = 0.0, mlp_act_layer: str = 'gelu',
                 drop_path_rate: float = 0.1, patch_norm: bool = True, norm_layer: str = 'ln',
                 downsample_version: str = 'v1', patchembed_version: str = 'v1',
                 out_indices: Sequence[int] = (0, 1, 2, 3), pretrained: str | None = None,
                 v_restore: str = 'released'):
        fixed('ssm_conv', ssm_conv, 3)
        fixed('ssm_act_layer', ssm_act_layer, 'silu')
        fixed('ssm_init', ssm_init, 'v0')
        fixed('mlp_act_layer', mlp_act_layer, 'gelu')
        fixed('patch_norm', patch_norm, True)
        fixed('norm_layer', norm_layer, 'ln', 'LN')
        super().__init__(
            dict(dim=stage_width(dims), depths=depths, ssm_ratio=ssm_ratio, state_dim=ssm_d_state,
                 dt_rank=None if ssm_dt_rank == 'auto' else ssm_dt_rank, mlp_ratio=mlp_ratio,
                 conv_bias=ssm_conv_bias, stem=patchembed_version, downsample=downsample_version,
                 **parse_forward_type(forward_type)),
            directions=directions, v_restore=v_restore, out_indices=out_indices,
            drop_path_rate=drop_path_rate, init_cfg=pretrained_init(pretrained))


@MODELS.register_module()
@strict_arguments
@ignores('final_pool_type', 'init_cfg', instead='LocalVim')
class MM_LocalVim(LocalVim):
    """LocalVim with the arguments that released configs end up with.

    One warning names the settings that the published class ignores.  For new configs use
    :class:`LocalVim`, where every setting counts.  Column scans are put back as the published code
    does it, on maps that are not square on wrong tokens; ``v_restore='exact'`` puts them right.

    Args:
        directions: one list of names per block; None for all eight in learned shares.
        img_size: side, or (height, width), for which the position embedding is built.
        patch_size: 16.
        embed_dim: token width.
        depth: number of blocks.
        out_indices: blocks to return.
        drop_path_rate: stochastic depth rate.
        rms_norm: RMSNorm instead of LayerNorm.
        if_rope, if_rope_residual: both or none.
        if_abs_pos_embed: True.
        bimamba_type: 'v2'.
        fused_add_norm, residual_in_fp32: choices of implementation; the result is the same.
        pretrained_ckpt: checkpoint file, loaded by ``init_weights``, not while building.
        v_restore: see above.

    ``final_pool_type`` and ``init_cfg`` are accepted without effect.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value that no released model uses.
    """

    def __init__(self, *, directions: Sequence[Sequence[str]] | None = None,
                 img_size: int | Sequence[int] = 224, patch_size: int = 16, embed_dim: int = 192,
                 depth: int = 20, out_indices: Sequence[int] = (4, 9, 14, 19),
                 drop_path_rate: float = 0.1, rms_norm: bool = False, if_rope: bool = False,
                 if_rope_residual: bool = False, if_abs_pos_embed: bool = True,
                 bimamba_type: str = 'v2', fused_add_norm: bool = False,
                 residual_in_fp32: bool = True, pretrained_ckpt: str | None = None,
                 v_restore: str = 'released'):
        fixed('patch_size', patch_size, 16)
        fixed('if_abs_pos_embed', if_abs_pos_embed, True)
        fixed('bimamba_type', bimamba_type, 'v2')
        fixed('if_rope_residual', if_rope_residual, if_rope)
        super().__init__(
            dict(dim=embed_dim, depth=depth), directions=directions, v_restore=v_restore,
            norm='rms' if rms_norm else 'ln', img_size=img_size, out_indices=out_indices,
            rope=if_rope, drop_path_rate=drop_path_rate,
            init_cfg=pretrained_init(pretrained_ckpt))
