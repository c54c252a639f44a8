"""RoI heads that mmdet lacks.

Not imported with the package, because they need mmdet: name `mmhybrid.models.roi_heads` in
`custom_imports`.
"""
from .cascade import OneMaskCascadeRoIHead

__all__ = ['OneMaskCascadeRoIHead']
