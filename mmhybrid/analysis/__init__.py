"""Counts what models cost, from shapes alone."""
from .conventions import CONVENTIONS, Convention
from .macs import KINDS, Record, Scan, count_macs, scan_macs
from .tables import Cost, Row, format_cost, summarize

__all__ = ['CONVENTIONS', 'KINDS', 'Convention', 'Cost', 'Record', 'Row', 'Scan', 'count_macs',
           'format_cost', 'scan_macs', 'summarize']
