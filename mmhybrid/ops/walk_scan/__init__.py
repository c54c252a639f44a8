"""Convolution, projections, scan and gate along several walks over one map, as one operation."""

from .fused import takes, walk_scan

__all__ = ['takes', 'walk_scan']
