"""The kernels around SS2D without a GPU: map_cases.py under the interpreter."""

from pathlib import Path

import pytest
from interpreter import run_cases

CASES = Path(__file__).with_name('map_cases.py')


def test_convolution_merge_and_mixers():
    assert run_cases(CASES, '-m', 'not slow') >= 25


@pytest.mark.slow
def test_more_forms_and_larger_maps():
    assert run_cases(CASES, '-m', 'slow') == 9
