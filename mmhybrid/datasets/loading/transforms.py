"""Transforms of classification, with Pillow and timm."""
from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mmhybrid.errors import UserError
from mmhybrid.registry import TRANSFORMS

__all__ = ['LoadPicture', 'TimmTransform']


@TRANSFORMS.register_module()
class LoadPicture:
    """Reads ``img_path`` with Pillow into ``img``, in RGB."""

    def __call__(self, results: dict) -> dict:
        """Add the picture."""
        with Image.open(results['img_path']) as file:
            return {**results, 'img': file.convert('RGB')}


@TRANSFORMS.register_module()
class TimmTransform:
    """What ``timm.data.create_transform`` builds: ``img`` (PIL) to the tensor ``inputs``.

    Args:
        input_size: side of the result in pixels.
        is_training: random crop, flip and what the other settings say; else resize and crop.
        auto_augment: for example 'rand-m9-mstd0.5'.
        interpolation: 'bicubic', 'bilinear' or 'random'.
        re_prob: probability of random erasing.
        re_mode: 'const', 'rand' or 'pixel'.
        crop_pct: side of the test crop over the short side of the resized picture.
        crop_mode: 'center'; 'squash' resizes to a square before the test crop; 'border' adds a
            border where the resized picture is smaller than the crop.
        scale: range of the random crop's share of the picture's area.

    The result (3, input_size, input_size) is float32, with ImageNet's mean and spread removed.
    """

    def __init__(self, input_size: int = 224, is_training: bool = False,
                 auto_augment: str | None = None, interpolation: str = 'bicubic',
                 re_prob: float = 0.0, re_mode: str = 'pixel', crop_pct: float = 0.875,
                 scale: Sequence[float] = (0.08, 1.0), crop_mode: str = 'center'):
        try:
            from timm.data import create_transform
        except ImportError as error:
            raise UserError('The transforms of classification come from timm, which cannot be '
                            f'imported ({error}). Run: pip install timm') from error
        if crop_mode not in ('center', 'squash', 'border'):
            raise ValueError(f"got crop_mode={crop_mode!r}, expected 'center', 'squash' or "
                             "'border'")
        self.transform = create_transform(
            input_size, is_training=is_training, auto_augment=auto_augment,
            interpolation=interpolation, re_prob=re_prob, re_mode=re_mode, crop_pct=crop_pct,
            crop_mode=crop_mode, scale=tuple(scale))

    def __call__(self, results: dict) -> dict:
        """Replace the picture by the tensor."""
        results = dict(results)
        results['inputs'] = self.transform(results.pop('img'))
        return {key: results[key] for key in ('inputs', 'labels', 'img_path')}
