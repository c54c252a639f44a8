"""Metrics. Importing it registers those that need mmengine alone."""
from .accuracy import TopAccuracy
from .dump import DumpSegmentation

__all__ = ['DumpSegmentation', 'TopAccuracy']
