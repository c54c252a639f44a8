"""What a run loads its data with. Importing it registers what configs name."""
from .image_folder import ImageFolder
from .packed_images import PackedImages
from .samplers import RepeatedAugmentSampler
from .transforms import LoadPicture, TimmTransform

__all__ = ['ImageFolder', 'LoadPicture', 'PackedImages', 'RepeatedAugmentSampler', 'TimmTransform']
