"""Networks of timm as backbones, for comparisons under one recipe."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmhybrid.layers import LayerNorm2d
from mmhybrid.registry import MODELS

from ..arguments import strict_arguments
from .base import DenseBackbone, check_flags, check_integers, check_out_indices, check_rate

__all__ = ['TimmFeatures']

_MOST_STAGES = 5  # some networks of timm have a map at stride 2 as well


@MODELS.register_module()
@strict_arguments
class TimmFeatures(DenseBackbone):
    """Hierarchical network of timm for dense prediction.

    Takes images (B, in_channels, H, W) and returns a tuple of maps, one per requested stage, with
    ``out_channels`` channels at ``out_strides`` pixels.  Any size from the largest stride on works
    with convolutional networks; odd sides are rounded as timm's network does it (ConvNeXt: down).

    Args:
        name: name of the network in timm, e.g. 'convnext_tiny'; it must be one that timm can cut
            into stages.
        out_indices: stages whose maps are returned, ascending.  Later stages are not built.
        drop_path_rate: stochastic depth rate of the last block.
        out_norm: whether each returned map gets a LayerNorm over channels (eps 1e-6), as
            segmentors and detectors with ConvNeXt have it.
        in_channels: channels of the images.
        settings: further arguments of timm's network, e.g. ``dict(ls_init_value=1.0)``.  timm
            refuses unknown ones.
        init_cfg: mmengine initialisation; for ``dict(type='Pretrained', checkpoint=path)`` see
            :func:`mmhybrid.models.checkpoints.load_backbone`; timm's own names are understood.

    Attributes:
        out_channels (tuple[int]): channels of each returned map.
        out_strides (tuple[int]): pixels of the image per pixel of each returned map.

    Raises:
        ImportError: if timm is missing.
        TypeError: for an unknown argument, here or in ``settings``.
        ValueError: for an unknown network or one without stages, a value out of range, and in the
            forward pass for an image smaller than the largest stride.
    """

    casts_together = False  # how timm's layers read their weights is theirs to say
    may_differ = r'outnorm\d\.|(head|norm|norm_pre|fc)\.'

    def __init__(self,
                 name: str,
                 *,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.0,
                 out_norm: bool = True,
                 in_channels: int = 3,
                 settings: Mapping[str, object] | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        check_out_indices(out_indices, _MOST_STAGES, '(0, 1, 2, 3)')
        check_rate('drop_path_rate', drop_path_rate)
        check_integers('in_channels', [in_channels], 1)
        check_flags(out_norm=out_norm)
        self.net = _create(name, tuple(out_indices), dict(
            settings or {}, in_chans=in_channels, drop_path_rate=drop_path_rate))
        self.out_channels = tuple(self.net.feature_info.channels())
        self.out_strides = tuple(self.net.feature_info.reduction())
        self.out_indices = tuple(out_indices)
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            norm = LayerNorm2d(channels, eps=1e-6) if out_norm else nn.Identity()
            self.add_module(f'outnorm{i}', norm)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            Contiguous maps (B, C_i, H_i, W_i).
        """
        if min(x.shape[-2:]) < self.out_strides[-1]:
            raise ValueError(f'got an image of {x.shape[-2]}x{x.shape[-1]} pixels, expected at '
                             f'least {self.out_strides[-1]} on each side, the largest stride; pad '
                             'it, e.g. with data_preprocessor.pad_size_divisor')
        maps = self.net(x)
        return tuple(getattr(self, f'outnorm{i}')(y).contiguous()
                     for i, y in zip(self.out_indices, maps, strict=True))

    def frozen_parts(self):
        """Nothing."""
        return ()

    def depth_of(self, name: str) -> int | None:
        """Count blocks; what leads to a stage belongs to the block before it."""
        part, _, rest = name.removeprefix('net.').partition('.')
        if not name.startswith('net.'):
            return None
        depth = 0
        for child, module in self.net.named_children():
            if child == part:
                block = re.match(r'blocks\.(\d+)', rest)
                return depth + int(block[1]) + 1 if block else depth
            depth += len(getattr(module, 'blocks', ()))
        raise AssertionError(f'{name} is no parameter of {type(self).__name__}')

    @property
    def num_depths(self) -> int:
        """Stem, blocks, and the output norms."""
        return 2 + sum(len(getattr(module, 'blocks', ())) for module in self.net.children())

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename entries of timm's own files: ``stages.0`` there is ``stages_0`` here."""
        renamed = {re.sub(r'\Anet\.([a-z]+)_(\d+)\.', r'\1.\2.', name): name
                   for name in self.state_dict()}
        return {renamed.get(name, name): tensor for name, tensor in state_dict.items()}


def _create(name: str, out_indices: tuple[int, ...], settings: dict) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"type='TimmFeatures' with name={name!r} needs timm, which is not installed: pip "
            'install timm') from error
    if not timm.is_model(name):
        raise ValueError(f'got name={name!r}, which timm {timm.__version__} does not have; '
                         f'timm.list_models() lists its networks')
    try:
        net = timm.create_model(name, features_only=True, out_indices=out_indices, **settings)
    except (RuntimeError, IndexError, AssertionError) as error:
        raise ValueError(f'got name={name!r} and out_indices={out_indices}, for which timm builds '
                         f'no stages ({error or type(error).__name__}); expected a network of '
                         'stages, such as convnext_tiny, and indices of these') from error
    if type(net).__name__ != 'FeatureListNet' or str(getattr(net, 'output_fmt', 'NCHW')).endswith(
            'NHWC'):
        raise ValueError(f'got name={name!r}, expected a network of timm with four stages of maps '
                         '(B, C, H, W), such as convnext_tiny; this one has another form')
    return net
