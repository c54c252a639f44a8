"""Backbones; importing this package registers them."""
from .mambavision import MambaVision

__all__ = ['MambaVision']
