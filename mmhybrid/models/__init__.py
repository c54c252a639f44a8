"""Models; importing this package registers them."""
from .backbones import LocalVim, LocalVMamba, MambaVision, TimmFeatures, Vim, VMamba
from .checkpoints import load_weights
from .classifiers import (
    ImageClassifier,
    LocalVimClassifier,
    LocalVMambaClassifier,
    MambaVisionClassifier,
    VimClassifier,
    VMambaClassifier,
)
from .dropins import MM_VSSM, MM_LocalVim, MM_LocalVSSM, MM_mamba_vision, VisionMambaSeg
from .necks import SimpleFPN

__all__ = ['ImageClassifier', 'LocalVMamba', 'LocalVMambaClassifier', 'LocalVim',
           'LocalVimClassifier', 'MM_LocalVSSM', 'MM_LocalVim', 'MM_VSSM', 'MM_mamba_vision',
           'MambaVision', 'MambaVisionClassifier', 'SimpleFPN', 'TimmFeatures', 'VMamba',
           'VMambaClassifier', 'Vim', 'VimClassifier', 'VisionMambaSeg', 'load_weights']
