"""From weights and pictures to what is in the pictures: ``mmhybrid predict``, ``mmhybrid.load``."""
from .predictor import Predictor, load
from .results import Detection, Segmentation

__all__ = ['Detection', 'Predictor', 'Segmentation', 'load']
