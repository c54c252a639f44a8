"""Classification forms of the backbones; importing this package registers them."""
from .image_classifier import ImageClassifier
from .localmamba import LocalVimClassifier, LocalVMambaClassifier
from .mambavision import MambaVisionClassifier
from .vim import VimClassifier
from .vmamba import VMambaClassifier

__all__ = ['ImageClassifier', 'LocalVMambaClassifier', 'LocalVimClassifier',
           'MambaVisionClassifier', 'VMambaClassifier', 'VimClassifier']
