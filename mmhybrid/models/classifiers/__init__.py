"""Classification forms of the backbones; importing this package registers them."""
from .mambavision import MambaVisionClassifier

__all__ = ['MambaVisionClassifier']
