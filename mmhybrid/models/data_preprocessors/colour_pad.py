"""Padding of a chosen colour that leaves the image's own shape known."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor

from mmhybrid.registry import MODELS

from ..arguments import strict_arguments

__all__ = ['ColourPadPreprocessor']


@MODELS.register_module()
@strict_arguments
class ColourPadPreprocessor(DetDataPreprocessor):
    """Normalise images and pad them on the right and at the bottom in one colour.

    A ``Pad`` step in the test pipeline would make the padding a part of the image: boxes may then
    lie outside of the photograph, where mmdet cannot paste masks on a CPU.

    Args:
        pad_colour: of the padding, in the order and units of ``mean``.
        mean: subtracted per channel.
        std: divided by per channel.
        pad_size_divisor: sides become multiples of it.
        pad_mask: pad the instances' masks as well.
        mask_pad_value: of the masks' padding.
        bgr_to_rgb: reverse the channels of what was loaded.
        non_blocking: copy to the device without waiting.

    Raises:
        ValueError: if there is not one number per channel.
    """

    def __init__(self, pad_colour: Sequence[float], mean: Sequence[float], std: Sequence[float], *,
                 pad_size_divisor: int = 32, pad_mask: bool = False, mask_pad_value: int = 0,
                 bgr_to_rgb: bool = False, non_blocking: bool = False):
        super().__init__(
            mean=mean, std=std, pad_size_divisor=pad_size_divisor, pad_mask=pad_mask,
            mask_pad_value=mask_pad_value, bgr_to_rgb=bgr_to_rgb, non_blocking=non_blocking)
        if len(pad_colour) != len(mean):
            raise ValueError(f'got pad_colour={pad_colour}, expected {len(mean)} numbers, one per '
                             'channel of mean')
        colour = torch.tensor(pad_colour, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer('pad_colour', (colour - self.mean) / self.std, persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Give ``inputs`` (B, C, H, W), normalised and padded, and the ``data_samples``."""
        sizes = [image.shape[-2:] for image in data['inputs']]
        data = super().forward(data, training)
        for image, (height, width) in zip(data['inputs'], sizes, strict=True):
            image[:, height:] = self.pad_colour
            image[:, :, width:] = self.pad_colour
        return data
