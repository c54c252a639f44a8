"""Everything around the training loop. Importing it registers what configs name."""
from .amp import AmpOptimWrapper
from .param_groups import HybridOptimWrapperConstructor

__all__ = ['AmpOptimWrapper', 'HybridOptimWrapperConstructor']
