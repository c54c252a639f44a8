"""Backbones; importing this package registers them."""
from .mambavision import MambaVision
from .mambavision_dropin import MM_mamba_vision
from .vim import Vim
from .vim_dropin import VisionMambaSeg
from .vmamba import VMamba
from .vmamba_dropin import MM_VSSM

__all__ = ['MM_VSSM', 'MM_mamba_vision', 'MambaVision', 'VMamba', 'Vim', 'VisionMambaSeg']
