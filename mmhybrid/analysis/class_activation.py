"""Which places of a map a score rests on."""
from __future__ import annotations

from torch import Tensor

__all__ = ['METHODS', 'activation_map']

#: How gradients weigh channels.
METHODS = ('hires-cam', 'grad-cam')


def activation_map(features: Tensor, gradient: Tensor, method: str = 'hires-cam') -> Tensor:
    """How much each place of a map adds to a score.

    'grad-cam' weighs each channel with the mean of its gradient over all places (Selvaraju et al.,
    "Grad-CAM", arXiv 1610.02391), so that it also lights up places which the score does not look
    at, if they look like those at which it does.  'hires-cam' weighs each place of each channel
    with its own gradient (Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful
    explanations", arXiv 2011.08891): a place without influence stays dark, so it tells apart the
    objects of a picture.

    Args:
        features: (C, h, w), what the score was computed from.
        gradient: (C, h, w), of the score with respect to the features.
        method: of :data:`METHODS`.

    Returns:
        (h, w), no less than 0.
    """
    if method not in METHODS:
        raise ValueError(f'got method={method!r}, expected one of {", ".join(METHODS)}')
    weights = gradient.mean(dim=(1, 2), keepdim=True) if method == 'grad-cam' else gradient
    return (weights * features).sum(dim=0).relu()
