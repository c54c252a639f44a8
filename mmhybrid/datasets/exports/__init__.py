"""Reading what annotation tools export, whatever its form, into one: :class:`Export`.

Readers of our own: supervision draws outlines into masks of whole pixels, knows neither nested
folders nor label images, and drops shapes; datumaro needs numpy 2.2 and a score of packages.
"""
from .common import Export, ExportError, Picture, Questions, Thing
from .recognise import FORMS, read_export

__all__ = ['FORMS', 'Export', 'ExportError', 'Picture', 'Questions', 'Thing', 'read_export']
