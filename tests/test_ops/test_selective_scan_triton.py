"""The Triton scan without a GPU: its kernels run in Triton's interpreter, in a fresh process.

The cases themselves are in triton_cases.py.
"""

from pathlib import Path

import pytest
from interpreter import run_cases

from mmhybrid.ops.selective_scan import available_backends, choose_backend, fused

CASES = Path(__file__).parent / 'triton_cases.py'


def test_values_and_gradients():
    assert run_cases(CASES, '-m', 'not slow', '-k', 'pairwise') >= 20


def test_properties_and_operators():
    assert run_cases(CASES, '-m', 'not slow', '-k', 'not pairwise') >= 15


@pytest.mark.slow
def test_full_product():
    assert run_cases(CASES, '-m', 'slow') >= 1000


def test_plan_follows_the_shape():
    for batch, heads, length in ((2, 160, 12544), (128, 320, 49), (1, 5, 1), (1, 384, 6085)):
        for chunk in (0, 1, 48, 10**6):
            plan = fused.launch_plan(batch, 1, heads, length, 8, 132, chunk)
            assert plan.chunk % plan.unroll == 0
            assert (plan.n_chunks - 1) * plan.chunk < length <= plan.n_chunks * plan.chunk
            assert plan.tile == 0 or plan.n_chunks <= 64
    assert fused.launch_plan(2, 1, 320, 1024, 8, 132).tile == 8
    # Many short sequences need one launch, few long ones fill the machine with chunks.
    assert fused.launch_plan(128, 1, 320, 49, 8, 132).n_chunks == 1
    detection = fused.launch_plan(2, 1, 160, 12544, 8, 132)
    assert detection.n_chunks * 2 * 5 > 8 * 132


def test_auto_says_why_it_falls_back():
    status = available_backends()['triton']
    if status.usable:
        pytest.skip('this machine can run the Triton kernels')
    assert status.reason
    assert choose_backend('auto', 'cuda') == 'torch'
    with pytest.raises(RuntimeError, match='Triton|GPU'):
        choose_backend('triton', 'cuda')
