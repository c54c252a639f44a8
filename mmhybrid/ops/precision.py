"""Where autocast must not interfere."""

import contextlib

import torch

__all__ = ['autocast_off']


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast for a device; the meta device has none to turn off."""
    if device.type == 'meta':
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
