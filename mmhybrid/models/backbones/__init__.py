"""Backbones; importing this package registers them."""
from .local_dropin import MM_LocalVim, MM_LocalVSSM
from .localvim import LocalVim
from .localvmamba import LocalVMamba
from .mambavision import MambaVision
from .mambavision_dropin import MM_mamba_vision
from .timm_features import TimmFeatures
from .vim import Vim
from .vim_dropin import VisionMambaSeg
from .vmamba import VMamba
from .vmamba_dropin import MM_VSSM

__all__ = ['LocalVMamba', 'LocalVim', 'MM_LocalVSSM', 'MM_LocalVim', 'MM_VSSM', 'MM_mamba_vision',
           'MambaVision', 'TimmFeatures', 'VMamba', 'Vim', 'VisionMambaSeg']
