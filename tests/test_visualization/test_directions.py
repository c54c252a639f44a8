"""The picture of the shares, read back from its pixels."""
import numpy as np
import pytest

from mmhybrid.visualization import draw_directions

NAMES = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')
FRAME = np.array((0xd1, 0x49, 0x5b))


def frames(picture):
    """Number of closed frames, counted where their left edges begin."""
    red = np.abs(np.asarray(picture).astype(int) - FRAME).max(axis=2) < 60
    columns = red.sum(axis=0)
    return red, columns


@pytest.mark.parametrize('rows', [1, 4, 33])
def test_chosen_directions_are_framed(rows):
    shares = {f'layers.{i}': np.full(8, 0.1) + 0.2 * (np.arange(8) == i % 8) for i in range(rows)}
    chosen = {block: (NAMES[i % 8],) for i, block in enumerate(shares)}
    none = draw_directions(shares, NAMES, {block: () for block in shares}, 'title')
    some = draw_directions(shares, NAMES, chosen, 'title')
    assert none.size == some.size and none.mode == 'RGB'
    assert some.height > 30 * rows
    assert frames(none)[0].sum() == 0
    red = frames(some)[0]
    # a frame is two lines of about a row's height; each block has one
    assert red.sum() > rows * 100
    lines = (red.sum(axis=1) > 40).astype(int)  # horizontal edges
    edges = (np.diff(lines) == 1).sum()
    assert edges == 2 * rows
    # the largest share is darker than the others
    pixels = np.asarray(none).sum(axis=2)
    assert pixels.min() < 250


def test_equal_shares():
    picture = draw_directions({'layers.0': [1 / 8] * 8}, NAMES, {'layers.0': NAMES[:4]})
    assert picture.width > 600
