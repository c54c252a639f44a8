"""What a run loads its data with. Importing it registers what configs name."""
from .image_folder import ImageFolder
from .samplers import RepeatedAugmentSampler
from .transforms import LoadPicture, TimmTransform

__all__ = ['ImageFolder', 'LoadPicture', 'RepeatedAugmentSampler', 'TimmTransform']
