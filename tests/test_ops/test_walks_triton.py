"""Scans through order tables without a GPU: walk_cases.py under the interpreter."""

from pathlib import Path

from interpreter import run_cases

CASES = Path(__file__).with_name('walk_cases.py')


def test_one_map_in_many_directions():
    assert run_cases(CASES, '-k', 'cross_scan') == 10


def test_mixers_and_their_convolution():
    assert run_cases(CASES, '-k', 'not cross_scan') >= 16
