"""Everything around the training loop. Importing it registers what configs name."""
from .amp import AmpOptimWrapper
from .param_groups import HybridOptimWrapperConstructor
from .random_state import RandomStateHook

__all__ = ['AmpOptimWrapper', 'HybridOptimWrapperConstructor', 'RandomStateHook']
