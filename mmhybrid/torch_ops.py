"""Operators of mmcv in plain PyTorch, for devices on which mmdet insists on compiled ones.

On a GPU mmdet's focal loss and mmcv's deformable attention call ``mmcv._ext``; on a CPU both have
ways of their own. These give the same values and gradients there, with more memory and launches
than a kernel.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['deformable_attention', 'focal_gradient', 'focal_loss']


def _is_target(logits: Tensor, target: Tensor) -> Tensor:
    """(N, C) bool; the target C is the background, which is not a class."""
    return target[:, None] == torch.arange(logits.shape[1], device=logits.device)


def focal_loss(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), not reduced.

    Args:
        logits: (N, C).
        target: (N) int64, classes from 0; C is the background.
        gamma: how much less sure ones count.
        alpha: weight of the class that is there; 1 - alpha that of the others.

    Returns:
        (N, C).
    """
    p = logits.sigmoid()
    return torch.where(_is_target(logits, target),
                       -alpha * (1 - p)**gamma * F.logsigmoid(logits),
                       -(1 - alpha) * p**gamma * F.logsigmoid(-logits))


def focal_gradient(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Derivative of :func:`focal_loss` by its logits, (N, C)."""
    p = logits.sigmoid()
    there = alpha * (1 - p)**gamma * (gamma * p * F.logsigmoid(logits) + p - 1)
    absent = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * F.logsigmoid(-logits))
    return torch.where(_is_target(logits, target), there, absent)


def deformable_attention(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
                         ) -> Tensor:
    """Deformable attention over several maps (Zhu et al. 2021).

    B images, L maps with S places together, H heads of D channels, Q queries, P points per map.

    Args:
        value: (B, S, H, D).
        shapes: (L, 2) int64, height and width of each map.
        locations: (B, Q, H, L, P, 2), x and y in parts of the map.
        weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D).
    """
    images, _, heads, width = value.shape
    queries, sizes = locations.shape[1], [tuple(size) for size in shapes.tolist()]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B H, Q, P, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, B H, 1, Q, P)
    total = value.new_zeros(images * heads, width, queries)
    parts = value.split([height * across for height, across in sizes], dim=1)
    for part, size, grid, share in zip(parts, sizes, grids, shares, strict=True):
        maps = part.permute(0, 2, 3, 1).reshape(images * heads, width, *size)
        seen = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros',
                             align_corners=False)  # (B H, D, Q, P)
        total = total + (seen * share).sum(-1)
    return total.view(images, heads * width, queries).transpose(1, 2).contiguous()
