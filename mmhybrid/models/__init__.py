"""Models; importing this package registers them."""
from .backbones import MM_VSSM, MambaVision, MM_mamba_vision, Vim, VisionMambaSeg, VMamba
from .classifiers import MambaVisionClassifier, VimClassifier, VMambaClassifier
from .necks import SimpleFPN

__all__ = ['MM_VSSM', 'MM_mamba_vision', 'MambaVision', 'MambaVisionClassifier', 'SimpleFPN',
           'VMamba', 'VMambaClassifier', 'Vim', 'VimClassifier', 'VisionMambaSeg']
