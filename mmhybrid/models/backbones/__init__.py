"""Backbones; importing this package registers them."""
from .localvim import LocalVim
from .localvmamba import LocalVMamba
from .mambavision import MambaVision
from .timm_features import TimmFeatures
from .vim import Vim
from .vmamba import VMamba

__all__ = ['LocalVMamba', 'LocalVim', 'MambaVision', 'TimmFeatures', 'VMamba', 'Vim']
