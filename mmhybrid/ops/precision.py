"""Where autocast must not interfere, and what must not be rounded to half."""

import contextlib

import torch

__all__ = ['at_least_float32', 'autocast_off']


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast for a device; the meta device has none to turn off."""
    if device.type == 'meta':
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Give float32 for half precision; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
