"""Scans through order tables without a GPU: walk_cases.py under the interpreter."""

from pathlib import Path

import pytest
from interpreter import run_cases

CASES = Path(__file__).with_name('walk_cases.py')


def test_directions_mixers_and_their_convolution():
    assert run_cases(CASES, '-m', 'not slow') >= 45


@pytest.mark.slow
def test_all_directions_and_larger_maps():
    assert run_cases(CASES, '-m', 'slow') >= 8
