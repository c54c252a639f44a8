"""What each token adds to the result of a selective scan at one place.

Given its steps and projections a scan is a sum: with y_t = C_t h_t + D x_t and
h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t, token s <= t adds
C_t exp(A (delta_(s+1) + ... + delta_t)) delta_s B_s x_s to y_t, and the token itself D x_t as well.

Legend: L tokens, E channels, N states.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ['Scan', 'contributions']


@dataclass(frozen=True)
class Scan:
    """One scan of one image, in its own order.

    Attributes:
        x: (E, L), what is scanned.
        delta: (E, L), steps after the softplus.
        A: (E, N), negative.
        B: (N, L).
        C: (N, L).
        D: (E,).
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


def contributions(scan: Scan, at: int) -> Tensor:
    """Split the result of a scan at one place into what each token adds.

    Args:
        scan: see :class:`Scan`.
        at: index of the place in the order of the scan.

    Returns:
        (E, L) float64; its sum over L is the result at ``at``, and 0 comes from later tokens.
    """
    x, delta, A, B, C, D = (part.detach().double() for part in (
        scan.x, scan.delta, scan.A, scan.B, scan.C, scan.D))
    added = torch.zeros_like(x)
    steps = delta[:, :at + 1]
    # the steps that lie between a token and the place
    between = steps.flip(1).cumsum(1).flip(1) - steps
    for n in range(A.shape[1]):
        added[:, :at + 1] += C[n, at] * torch.exp(A[:, n:n + 1] * between) * steps * B[n, :at + 1]
    added *= x
    added[:, at] += D * x[:, at]
    return added
