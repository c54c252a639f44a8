"""Data preprocessors that mmdet lacks.

Not imported with the package, because they need mmdet: name `mmhybrid.models.data_preprocessors` in
`custom_imports`.
"""
from .colour_pad import ColourPadPreprocessor

__all__ = ['ColourPadPreprocessor']
