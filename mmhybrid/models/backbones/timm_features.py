"""Networks of timm as backbones, for comparisons under one recipe."""
from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from mmhybrid.layers import LayerNorm2d
from mmhybrid.registry import MODELS

from ..arguments import check_flags, check_integers, check_out_indices, check_rate, strict_arguments
from .base import DenseBackbone

__all__ = ['TimmFeatures']

_MOST_BLOCKS = 100  # timm says which of them a network has
# Settings that let networks of one image size take any, where timm has them.
_ANY_SIZE = dict(dynamic_img_size=True, strict_img_size=False)


@MODELS.register_module()
@strict_arguments
class TimmFeatures(DenseBackbone):
    """Network of timm for dense prediction: of stages (ConvNeXt, Swin) or tokens (DeiT, EVA, DINO).

    Takes images (B, in_channels, H, W) and returns a tuple of maps, one per requested stage or
    block, with ``out_channels`` channels at ``out_strides`` pixels.  Any size from the largest
    stride on works with convolutional networks, Swin, and networks of tokens; odd sides are rounded
    as timm's network does it (ConvNeXt down, tokens and Swin up, with zeros at the right and at the
    bottom).  Position embeddings are resized to the grid of each image; ``settings=dict(
    img_size=512)`` makes them, and those of a file, fit one size for good.

    Args:
        name: name of the network in timm, e.g. 'convnext_tiny' or 'deit_tiny_patch16_224'.
        out_indices: stages, or blocks of a network of tokens, whose maps are returned, ascending.
            Later ones are not built.
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
        ValueError: for an unknown network or one without maps, a value out of range, and in the
            forward pass for an image smaller than the largest stride.
    """

    casts_together = False  # how timm's layers read their weights is theirs to say
    may_differ = (r'outnorm\d+\.|(head|head_dist|norm|norm_pre|fc|fc_norm)\.'
                  r'|.*\.(attn_mask|relative_position_index)\Z')

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
        check_out_indices(out_indices, _MOST_BLOCKS, '(0, 1, 2, 3)')
        check_rate('drop_path_rate', drop_path_rate)
        check_integers('in_channels', [in_channels], 1)
        check_flags(out_norm=out_norm)
        self.net = _create(name, tuple(out_indices), dict(
            settings or {}, in_chans=in_channels,
            **(dict(drop_path_rate=drop_path_rate) if drop_path_rate else {})))
        self.out_channels = tuple(self.net.feature_info.channels())
        self.out_strides = tuple(self.net.feature_info.reduction())
        self.out_indices = tuple(out_indices)
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            norm = LayerNorm2d(channels, eps=1e-6) if out_norm else nn.Identity()
            self.add_module(f'outnorm{i}', norm)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages or blocks.

        Args:
            x: (B, in_channels, H, W).

        Returns:
            Contiguous maps (B, C_i, H_i, W_i).
        """
        if min(x.shape[-2:]) < self.out_strides[-1]:
            raise ValueError(f'got an image of {x.shape[-2]}x{x.shape[-1]} pixels, expected at '
                             f'least {self.out_strides[-1]} on each side, the largest stride; pad '
                             'it, e.g. with data_preprocessor.pad_size_divisor')
        try:
            maps = self.net(x)
        except AssertionError as error:
            raise ValueError(f'got an image of {x.shape[-2]}x{x.shape[-1]} pixels, which this '
                             f'network of timm does not take ({str(error).rstrip(".")}); give all '
                             'images one size and set settings=dict(img_size=(height, width)), or '
                             'take another network') from error
        if str(getattr(self.net, 'output_fmt', 'NCHW')).endswith('NHWC'):
            maps = [y.permute(0, 3, 1, 2) for y in maps]
        return tuple(getattr(self, f'outnorm{i}')(y).contiguous()
                     for i, y in zip(self.out_indices, maps, strict=True))

    def frozen_parts(self):
        """Nothing."""
        return ()

    def depth_of(self, name: str) -> int | None:
        """Count blocks; what leads to a stage belongs to the block before it."""
        return self._depths[name] if name.startswith('net.') else None

    @property
    def num_depths(self) -> int:
        """Stem, blocks, and the output norms."""
        return 2 + max(self._depths.values())

    @cached_property
    def _depths(self) -> dict[str, int]:
        depths, seen = {}, []
        for name, _ in self.named_parameters():
            block = re.match(r'net\..*\bblocks\.\d+(?=\.)', name)
            if block and block[0] not in seen:
                seen.append(block[0])
            if name.startswith('net.'):
                depths[name] = len(seen)
        return depths

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename entries of timm's own files, and fit their position embedding.

        ``stages.0`` there is ``stages_0`` here, and ``blocks.0`` is ``model.blocks.0``.
        """
        renamed = {re.sub(r'\A([a-z]+)_(\d+)\.', r'\1.\2.',
                          re.sub(r'\Anet\.(model\.)?', '', name)): name
                   for name in self.state_dict() if name.startswith('net.')}
        fitted = {renamed.get(name, name): tensor for name, tensor in state_dict.items()}
        name = 'net.model.pos_embed'
        own, given = self.state_dict().get(name), fitted.get(name)
        if own is not None and given is not None and own.dim() == given.dim() == 3 and (
                own.shape[1] != given.shape[1] and own.shape[2] == given.shape[2]):
            fitted[name] = _resized_positions(given, self.net.model)
        return fitted


def _resized_positions(tokens: Tensor, model: nn.Module) -> Tensor:
    """Position embedding (1, prefix + h * w, C) of a square grid for the grid of a network."""
    from timm.layers import resample_abs_pos_embed
    prefix = 0 if getattr(model, 'no_embed_class', False) else model.num_prefix_tokens
    if math.isqrt(tokens.shape[1] - prefix) ** 2 != tokens.shape[1] - prefix:
        return tokens  # of other prefixes; loading it tells
    return resample_abs_pos_embed(
        tokens, list(model.patch_embed.grid_size), num_prefix_tokens=prefix)


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
    with torch.device('meta'):
        classes = type(timm.create_model(name, **settings)).__mro__
    known = {key for cls in classes if issubclass(cls, nn.Module)
             for key in inspect.signature(cls.__init__).parameters}
    any_size = {key: value for key, value in _ANY_SIZE.items() if key in known}
    try:
        net = timm.create_model(
            name, features_only=True, out_indices=out_indices, **{**any_size, **settings})
    except (RuntimeError, IndexError, AssertionError) as error:
        raise ValueError(f'got name={name!r} and out_indices={out_indices}, for which timm builds '
                         f'no maps ({error or type(error).__name__}); expected a network of '
                         'stages or tokens, such as convnext_tiny or deit_tiny_patch16_224, and '
                         'indices of its stages or blocks') from error
    for part in net.modules():
        if hasattr(part, 'dynamic_img_pad'):  # what embeds patches
            part.dynamic_img_pad = True
    return net
