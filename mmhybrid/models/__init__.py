"""Models; importing this package registers them."""
from .backbones import MM_VSSM, MambaVision, MM_mamba_vision, VMamba
from .classifiers import MambaVisionClassifier, VMambaClassifier

__all__ = ['MM_VSSM', 'MM_mamba_vision', 'MambaVision', 'MambaVisionClassifier', 'VMamba',
           'VMambaClassifier']
