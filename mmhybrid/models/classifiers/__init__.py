"""Classification forms of the backbones; importing this package registers them."""
from .localmamba import LocalVimClassifier, LocalVMambaClassifier
from .mambavision import MambaVisionClassifier
from .vim import VimClassifier
from .vmamba import VMambaClassifier

__all__ = ['LocalVMambaClassifier', 'LocalVimClassifier', 'MambaVisionClassifier',
           'VMambaClassifier', 'VimClassifier']
