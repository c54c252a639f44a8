"""Plain ``nn.Module`` building blocks; no registry, no mmengine."""
from .attention import Attention
from .conv import ConvBlock, ConvStem, Downsample
from .direction_merge import (
    ChannelAttention,
    DirectionMixture,
    SpatialChannelAttention,
    merge_directions,
)
from .drop_path import DropPath, draw_together, drop_path_or_identity, dropped
from .linear import Linear2d, map_linear, token_linear
from .mixers.directional import prepare_mixers
from .mixers.localvim import LocalVimMixer
from .mixers.mambavision import MambaVisionMixer
from .mixers.ss2d import SS2D, LocalSS2D, decay_rates
from .mixers.vim import VimMixer
from .mlp import Mlp
from .norm import LayerNorm, LayerNorm2d, PortableSyncBatchNorm, RMSNorm, add_norm
from .pool import MapPool
from .recompute import recomputed
from .rope import Rope2d, resize_grid, rotate, rotated_sum
from .weight_casts import casts_weights
from .window import exporting, near_equal, window_partition, window_unpartition, windows_along

__all__ = [
    'SS2D', 'Attention', 'ChannelAttention', 'ConvBlock', 'ConvStem', 'DirectionMixture',
    'Downsample', 'DropPath', 'LayerNorm', 'LayerNorm2d', 'Linear2d', 'LocalSS2D', 'LocalVimMixer',
    'MambaVisionMixer', 'MapPool', 'Mlp', 'PortableSyncBatchNorm', 'RMSNorm', 'Rope2d',
    'SpatialChannelAttention', 'VimMixer',
    'add_norm', 'casts_weights', 'decay_rates', 'draw_together',
    'drop_path_or_identity', 'dropped', 'exporting', 'map_linear', 'merge_directions', 'near_equal',
    'prepare_mixers', 'recomputed', 'resize_grid', 'rotate', 'rotated_sum', 'token_linear',
    'window_partition', 'window_unpartition', 'windows_along',
]
