"""Sum of scan directions, layer norm and gate in one pass over the map."""

from .attend import Attention, attend_norm
from .merge import merge_norm, merge_norm_reference

__all__ = ['Attention', 'attend_norm', 'merge_norm', 'merge_norm_reference']
