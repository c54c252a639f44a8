"""Sum of scan directions, layer norm and gate in one pass over the map."""

from .merge import merge_norm, merge_norm_reference

__all__ = ['merge_norm', 'merge_norm_reference']
