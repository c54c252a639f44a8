"""Rotary tables of plain backbones."""

import math

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from mmhybrid.layers import Rope2d


def test_tables_of_another_grid_are_made_where_they_are_used():
    """A copy from the host would wait for the GPU, and be impossible in a CUDA graph."""
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            devices.add(result.device.type)
            return result

    made = Rope2d(24, (6, 6))(grid := (3, 5))
    on_meta = Rope2d(24, (6, 6)).to('meta')
    with Watch():
        cos, sin = on_meta(grid)
    assert devices == {'meta'} and cos.shape == sin.shape == (15, 24)
    # the row turns the first half of the channels, the column the second
    angle = 1 / 3 * 14
    assert made[0][5, 0] == pytest.approx(math.cos(angle)) and made[1][5, 12] == 0
