"""Scans through order tables without a GPU: walk_cases.py under the interpreter."""

from pathlib import Path

import pytest
from interpreter import run_cases

CASES = Path(__file__).with_name('walk_cases.py')


@pytest.mark.gpu
def test_one_map_in_many_directions():
    assert run_cases(CASES, '-m', 'not slow', '-k', 'cross_scan') == 10


@pytest.mark.gpu
def test_mixers_and_their_convolution():
    assert run_cases(CASES, '-m', 'not slow', '-k', 'not cross_scan') >= 16


@pytest.mark.slow
def test_all_directions_in_learned_shares():
    assert run_cases(CASES, '-m', 'slow') == 1
