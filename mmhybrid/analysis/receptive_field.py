"""Which pixels of an image a pixel of a network's map depends on."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ['covering_sides', 'receptive_field']


def receptive_field(backbone: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> Tensor:
    """Effective receptive field of the middle pixel of a backbone's last map.

    Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks"
    (arXiv 1701.04128): the gradient of the pixel with respect to the images; here of the sum of its
    positive channels (the sum of all is the same everywhere after a LayerNorm), its absolute value,
    summed over colours and averaged over images.

    Args:
        backbone: gives maps (B, C, h, w), the last of which is looked at.
        images: (B, 3, H, W).

    Returns:
        (H, W), float64, no less than 0; the largest value is 1.

    Raises:
        ValueError: the pixel depends on no pixel of the images, or its gradient is not a number.
    """
    total = torch.zeros(images.shape[-2:], dtype=torch.float64)
    for image in images.split(1):
        image = image.detach().requires_grad_()
        with torch.enable_grad():
            last = backbone(image)[-1]
            middle = last[:, :, last.shape[2] // 2, last.shape[3] // 2].float().relu().sum()
            (gradient,) = torch.autograd.grad(middle, image)
        total += gradient.abs().sum(dim=(0, 1)).double().cpu()
    most = total.max()
    if not torch.isfinite(total).all() or most == 0:
        what = 'no gradient' if most == 0 else 'a gradient that is not a number'
        raise ValueError(f'the middle pixel of the last map has {what} with '
                         'respect to the images; are the weights those of a trained network?')
    return total / most


def covering_sides(field: Tensor, shares: Sequence[float]) -> list[int]:
    """Sides of the smallest squares around the middle that hold shares of a receptive field.

    Args:
        field: (H, W), of :func:`receptive_field`.
        shares: numbers between 0 and 1, ascending.

    Returns:
        One odd side in pixels for each share; squares are cut at the border of the image.
    """
    height, width = field.shape
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :]).flatten()
    within = torch.zeros(int(distance.max()) + 1, dtype=field.dtype)
    within.index_add_(0, distance, field.flatten())
    within = within.cumsum(0) / field.sum()
    wanted = torch.tensor([share * (1 - 1e-12) for share in shares], dtype=within.dtype)
    return [2 * int(radius) + 1 for radius in torch.searchsorted(within, wanted)]
