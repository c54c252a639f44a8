"""The published configs' spelling of VMamba, so that they build by changing one import."""
from __future__ import annotations

import re
from collections.abc import Sequence

from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from ..backbones.vmamba import VMamba
from .common import SWIN_BASE, fixed, ignores, pretrained_init

__all__ = ['MM_VSSM']

# Base forms that are one function of the same weights; they differ in the precision of the scan.
_FLOAT32_FORMS = ('v0', 'v0seq', 'v01', 'v02', 'v03', 'v2')
_INPUT_FORMS = ('v04', 'v05', 'v3')


def parse_forward_type(name: str) -> dict:
    """Read a mixer name such as 'v05_noz': which parts the mixer has and how precise it scans.

    Raises:
        ValueError: for the names of ablations and of nothing.
    """
    match = re.fullmatch(r'([^_]+)(_noz)?(_no32)?', str(name))
    if not match or match[1] not in _FLOAT32_FORMS + _INPUT_FORMS:
        raise ValueError(
            f'got forward_type={name!r}, expected one of '
            f'{", ".join(_FLOAT32_FORMS + _INPUT_FORMS)}, followed by _noz for no gate and by '
            '_no32 for a scan in the precision of its input; other forms have no released weights')
    return dict(gate=match[2] is None,
                float32_scan=match[1] in _FLOAT32_FORMS and match[3] is None)


@MODELS.register_module()
@strict_arguments
@ignores(*SWIN_BASE, instead='VMamba')
class MM_VSSM(VMamba):
    """VMamba with the arguments that released detection and segmentation configs end up with.

    What the configs inherit from Swin bases does nothing, as in the published class; one warning
    names each such setting.  For new configs use :class:`VMamba`, where every setting counts.

    Args:
        dims: channels of stage 1, or of all four, each twice the one before.
        depths: blocks per stage.
        ssm_d_state: states per channel.
        ssm_ratio: inner width of the mixer over its input.
        ssm_dt_rank: rank of the step; 'auto' for ceil(channels / 16).
        ssm_conv: side of the depth-wise convolution; 3.
        ssm_conv_bias: whether it has a bias.
        ssm_act_layer: activation of the mixer; 'silu'.
        ssm_init: how the scan is initialised; 'v0'.
        forward_type: form of the mixer; 'v2', the default, means the gated float32 form.
        mlp_ratio: hidden width of the MLPs over their input; 0 for none.
        mlp_act_layer: activation of the MLPs; 'gelu'.
        drop_path_rate: stochastic depth rate of the last block.
        patch_norm: True.
        norm_layer: 'ln2d' for (B, C, H, W) maps inside, 'ln' for (B, H, W, C).
        downsample_version: 'v1', 'v2' or 'v3'.
        patchembed_version: 'v1' or 'v2'.
        out_indices: stages to return.
        pretrained: checkpoint file, loaded by ``init_weights``, not while building; '' for none.

    What :data:`SWIN_BASE` lists is accepted without effect.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value that no released model uses.
    """

    def __init__(self, *, dims: int | Sequence[int] = 96, depths: Sequence[int] = (2, 2, 9, 2),
                 ssm_d_state: int = 16, ssm_ratio: float = 2.0, ssm_dt_rank: int | str = 'auto',
                 ssm_conv: int = 3, ssm_conv_bias: bool = True, ssm_act_layer: str = 'silu',
                 ssm_init: str = 'v0', forward_type: str = 'v2', mlp_ratio: float = 4.0,
                 mlp_act_layer: str = 'gelu', drop_path_rate: float = 0.1,
                 patch_norm: bool = True, norm_layer: str = 'ln', downsample_version: str = 'v2',
                 patchembed_version: str = 'v1', out_indices: Sequence[int] = (0, 1, 2, 3),
                 pretrained: str | None = None):
        fixed('ssm_conv', ssm_conv, 3)
        fixed('ssm_act_layer', ssm_act_layer, 'silu')
        fixed('ssm_init', ssm_init, 'v0')
        fixed('mlp_act_layer', mlp_act_layer, 'gelu')
        fixed('patch_norm', patch_norm, True)
        fixed('norm_layer', norm_layer, 'ln', 'ln2d', 'LN', 'LN2D')
        super().__init__(
            dict(dim=stage_width(dims), depths=depths, ssm_ratio=ssm_ratio, state_dim=ssm_d_state,
                 dt_rank=None if ssm_dt_rank == 'auto' else ssm_dt_rank, mlp_ratio=mlp_ratio,
                 conv_bias=ssm_conv_bias, channel_first=norm_layer.lower() == 'ln2d',
                 stem=patchembed_version, downsample=downsample_version,
                 **parse_forward_type(forward_type)),
            out_indices=out_indices, drop_path_rate=drop_path_rate,
            init_cfg=pretrained_init(pretrained))


def stage_width(dims: int | Sequence[int]) -> int:
    """Channels of stage 1 from one number or from all four.

    Raises:
        ValueError: if a stage is not twice as wide as the one before.
    """
    if isinstance(dims, (list, tuple)):
        if not dims or list(dims) != [dims[0] * 2 ** i for i in range(4)]:
            raise ValueError(f'got dims={dims}, expected one number, or four that double from '
                             'stage to stage')
        return dims[0]
    return dims
