"""Causal depth-wise convolution and SiLU along several walks over one map."""

from .conv import walk_conv

__all__ = ['walk_conv']
