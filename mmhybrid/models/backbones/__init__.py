"""Backbones; importing this package registers them."""
from .mambavision import MambaVision
from .mambavision_dropin import MM_mamba_vision

__all__ = ['MM_mamba_vision', 'MambaVision']
