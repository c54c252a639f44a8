"""Precision of what must not be rounded to half."""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['at_least_float32']


def at_least_float32(x: Tensor) -> Tensor:
    """Give float32 for half precision; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
