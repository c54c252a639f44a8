"""One abstraction for every scan over a map: named directions, order tables, and the way back.

See README.md in this folder for the definitions.
"""
from .orders import DIRECTIONS, Direction, ScanOrder, ScanPlan, scan_plan
from .scan import cross_merge, cross_restore, cross_scan, cross_selective_scan

__all__ = ['DIRECTIONS', 'Direction', 'ScanOrder', 'ScanPlan', 'cross_merge', 'cross_restore',
           'cross_scan', 'cross_selective_scan', 'scan_plan']
