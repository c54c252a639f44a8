import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmhybrid.datasets.masks import bounding_box, mask_to_polygons, mask_to_rle


def _mask(*rows):
    return np.array([[c == '#' for c in row] for row in rows])


CASES = {
    'pixel': _mask('#'),
    'full': np.ones((5, 7), dtype=bool),
    'ring': _mask('.....', '.###.', '.#.#.', '.###.', '.....'),
    'two_holes': _mask('#######', '#.###.#', '#######', '##...##', '#######'),
    'corner_touch': _mask('##..', '##..', '..##', '..##'),
    'corner_touch_inside': _mask('####', '#.##', '##.#', '####'),
    'nested': _mask('#######', '#.....#', '#.###.#', '#.#.#.#', '#.###.#', '#.....#', '#######'),
    'noise': np.random.RandomState(0).rand(37, 41) > 0.55,
}


@pytest.mark.parametrize('name', CASES)
def test_polygons_decode_to_the_same_mask(name):
    mask = CASES[name]
    polygons = mask_to_polygons(mask)
    assert all(len(polygon) >= 8 and len(polygon) % 2 == 0 for polygon in polygons)
    decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape)))
    assert np.array_equal(decoded.astype(bool), mask)


@pytest.mark.parametrize('name', CASES)
def test_run_lengths_decode_to_the_same_mask(name):
    mask = CASES[name]
    rle = mask_to_rle(mask)
    assert rle['size'] == list(mask.shape)
    assert sum(rle['counts']) == mask.size
    decoded = coco_mask.decode(coco_mask.frPyObjects(rle, *mask.shape))
    assert np.array_equal(decoded.astype(bool), mask)


def test_bounding_box():
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:5, 3:10] = True
    assert bounding_box(mask) == [3, 2, 7, 3]
