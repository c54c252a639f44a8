import numpy as np
import pytest

from mmhybrid.datasets import drawing
from mmhybrid.datasets.drawing import Kind, Placed


def test_disc_is_anti_aliased_and_has_its_area():
    kind = Kind('disc', drawing.disc, drawing.plain_pattern)
    item = drawing.rasterize(kind, 0, (30.3, 24.7), (15.0, 10.0), 20.0, (50, 60))
    assert item.alpha.max() == drawing.ALPHA_MAX
    partly = (item.alpha > 0) & (item.alpha < drawing.ALPHA_MAX)
    assert partly.sum() > 30
    area = np.pi * 15 * 10
    assert item.alpha.sum() / drawing.ALPHA_MAX == pytest.approx(area, rel=0.01)
    # The mask is alpha >= 0.5: it neither grows nor shrinks the object.
    assert item.inside().sum() == pytest.approx(area, rel=0.02)
    assert not item.inside()[item.alpha < drawing.ALPHA_MAX / 2].any()


def test_rasterize_clips_and_reports_nothing_outside():
    kind = Kind('disc', drawing.disc, drawing.plain_pattern)
    item = drawing.rasterize(kind, 0, (0.0, 0.0), (10.0, 10.0), 0.0, (50, 60))
    assert (item.top, item.left) == (0, 0)
    assert item.alpha.shape == (10, 10)
    assert drawing.rasterize(kind, 0, (-30.0, 5.0), (10.0, 10.0), 0.0, (50, 60)) is None


def test_visible_masks_know_what_is_in_front():
    full = np.full((4, 4), drawing.ALPHA_MAX)
    back, front = Placed(0, 0, 0, full, full), Placed(0, 2, 2, full, full)
    masks = drawing.visible_masks([back, front], (8, 8))
    assert masks[0].sum() == 12 and masks[1].sum() == 16
    assert not (masks[0] & masks[1]).any()


def test_placing_keeps_every_object_recognisable():
    kinds = [Kind('disc', drawing.disc, drawing.plain_pattern)]
    size, overlaps = (120, 120), 0
    for seed in range(10):
        rng = np.random.RandomState(seed)
        placed = drawing.place_objects(rng, kinds, [0] * 6, size, (15.0, 30.0), min_visible=0.5)
        for item, mask in zip(placed, drawing.visible_masks(placed, size), strict=True):
            share = mask.sum() / item.inside().sum()
            assert share >= 0.5
            overlaps += share < 1
    assert overlaps > 10
