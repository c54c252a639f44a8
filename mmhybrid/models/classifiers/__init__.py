"""Classification forms of the backbones; importing this package registers them."""
from .mambavision import MambaVisionClassifier
from .vim import VimClassifier
from .vmamba import VMambaClassifier

__all__ = ['MambaVisionClassifier', 'VMambaClassifier', 'VimClassifier']
