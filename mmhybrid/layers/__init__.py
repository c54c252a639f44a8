"""Plain ``nn.Module`` building blocks; no registry, no mmengine."""
from .attention import Attention
from .conv import ConvBlock, ConvStem, Downsample
from .drop_path import DropPath, drop_path_or_identity
from .linear import token_linear
from .mixer import MambaVisionMixer
from .mlp import Mlp
from .norm import LayerNorm2d
from .recompute import recomputed
from .window import window_partition, window_unpartition

__all__ = [
    'Attention', 'ConvBlock', 'ConvStem', 'Downsample', 'DropPath', 'LayerNorm2d',
    'MambaVisionMixer', 'Mlp', 'drop_path_or_identity', 'recomputed', 'token_linear',
    'window_partition', 'window_unpartition'
]
