"""LocalVMamba: VMamba's skeleton with windowed scan directions, chosen per block.

Written from a description of behaviour of the published networks, so that their weights load; from
Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
2403.09338).
"""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmhybrid.families.localvmamba import LOCALVMAMBA
from mmhybrid.layers import LocalSS2D
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from .local_directions import (
    LOCAL_VMAMBA_SMALL,
    LOCAL_VMAMBA_TINY,
    ColumnRestore,
    resolve_directions,
)
from .vmamba import VSSBackbone, checked_vss_architecture

__all__ = ['ARCHITECTURES', 'LocalVMamba']

ARCHITECTURES = LOCALVMAMBA.architectures
_SEARCHED = {'tiny': LOCAL_VMAMBA_TINY, 'small': LOCAL_VMAMBA_SMALL}
_OPTIONAL = LOCALVMAMBA.optional


@MODELS.register_module()
@strict_arguments
class LocalVMamba(ColumnRestore, VSSBackbone):
    """LocalVMamba backbone for dense prediction.

    Takes images (B, in_channels, H, W) of any size and returns a tuple of maps, one per requested
    stage, with ``out_channels`` channels at ``out_strides`` pixels.  Parameter names are those of
    the published weights.

    Args:
        arch: tiny or small, or a dictionary with the keys dim and depths and optionally ssm_ratio
            (2.0), state_dim (16), dt_rank (None: ceil(C / 16)), mlp_ratio (0: no MLP), conv_bias
            (True), stem ('v1'), downsample ('v1') and float32_scan (True).
        directions: 'searched' for the published directions of ``arch``, 'unsearched', one list of
            names per block, or None for all eight in learned shares (to search).  Files cannot
            tell which directions they were trained with.
        v_restore: 'exact', or 'released' for what the published code computes: it puts results of
            the column scans on wrong pixels unless the map is square.
        out_indices: stages whose maps are returned, ascending, 0 to 3.  Stages after the last
            requested one are built, so that weights fit, but neither run nor trained.
        drop_path_rate: stochastic depth rate of the last block, growing linearly from 0 at the
            first.
        in_channels: channels of the images.
        frozen_stages: -1 freezes nothing, 0 the stem, k also the first k stages; frozen parts stay
            in eval mode and need no gradient.  Output norms are never frozen.
        with_cp: whether to save memory by recomputing blocks in the backward pass; or one flag for
            each stage, or the numbers of the stages where it is done.
        scan_backend: implementation of the scan, see :func:`mmhybrid.ops.selective_scan`.
        attention: what each direction goes through before the sum: 'channel' as in the published
            networks, 'channel-spatial' as in the paper (scaling tokens too), or 'none'.
        lora: None, or settings of low-rank adapters, which learn in place of the weights, such as
            ``dict(rank=8)``; see :class:`mmhybrid.models.lora.Lora`.
        init_cfg: mmengine initialisation; for ``dict(type='Pretrained', checkpoint=path)`` see
            :func:`mmhybrid.models.checkpoints.load_backbone`.

    Attributes:
        out_channels (tuple[int]): channels of each returned map.
        out_strides (tuple[int]): pixels of the image per pixel of each returned map.
        directions (list): names per block, None where they are searched.

    Raises:
        TypeError: for an unknown argument or a value of the wrong type.
        ValueError: for a value out of range.
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 *,
                 directions: str | Sequence[Sequence[str]] | None = 'searched',
                 v_restore: str = 'exact',
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.2,
                 in_channels: int = 3,
                 frozen_stages: int = -1,
                 with_cp: bool | Sequence[bool] | Sequence[int] = False,
                 scan_backend: str = 'auto',
                 attention: str = 'channel',
                 lora: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        searched = _SEARCHED.get(arch) if isinstance(arch, str) else None
        arch = checked_vss_architecture(arch, ARCHITECTURES, _OPTIONAL)
        if arch['channel_first'] or not arch['gate']:
            raise ValueError("got arch['channel_first']=True or arch['gate']=False; LocalVMamba "
                             'exists with (B, H, W, C) maps and gated mixers only')
        chosen = resolve_directions(directions, sum(arch['depths']), searched)

        def mixer(index: int, dim: int) -> LocalSS2D:
            return LocalSS2D(dim, chosen[index], state_dim=arch['state_dim'],
                             ratio=arch['ssm_ratio'], dt_rank=arch['dt_rank'],
                             conv_bias=arch['conv_bias'], float32_scan=arch['float32_scan'],
                             v_restore=v_restore, backend=scan_backend, attention=attention)

        super().__init__(arch, mixer, out_indices=out_indices, drop_path_rate=drop_path_rate,
                         in_channels=in_channels, frozen_stages=frozen_stages, with_cp=with_cp,
                         lora=lora, init_cfg=init_cfg)
        self.directions, self.v_restore = chosen, v_restore

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to the map of the first stage, (B, H, W, C)."""
        x = super().embed(x)
        self.tell_restore(*x.shape[1:3])
        return x
