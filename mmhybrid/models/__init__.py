"""Models; importing this package registers them."""
from .backbones import MambaVision, MM_mamba_vision
from .classifiers import MambaVisionClassifier

__all__ = ['MM_mamba_vision', 'MambaVision', 'MambaVisionClassifier']
