"""Operators: tensors in, tensors out. Nothing here knows mmengine, mmcv or torchvision."""

from .cross_scan import cross_merge, cross_scan, cross_selective_scan, scan_plan
from .selective_scan import available_backends, selective_scan
from .selective_scan.ordered import selective_scan_ordered

__all__ = [
    'available_backends', 'cross_merge', 'cross_scan', 'cross_selective_scan', 'scan_plan',
    'selective_scan', 'selective_scan_ordered',
]
