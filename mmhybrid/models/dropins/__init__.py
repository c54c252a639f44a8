"""Backbones with the arguments of the released configs; importing this package registers them."""
from .localmamba import MM_LocalVim, MM_LocalVSSM
from .mambavision import MM_mamba_vision
from .vim import VisionMambaSeg
from .vmamba import MM_VSSM

__all__ = ['MM_LocalVSSM', 'MM_LocalVim', 'MM_VSSM', 'MM_mamba_vision', 'VisionMambaSeg']
