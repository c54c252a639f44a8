"""Necks; importing this package registers them."""
from .simple_fpn import SimpleFPN

__all__ = ['SimpleFPN']
