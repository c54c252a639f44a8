"""The Triton scan without a GPU: its kernels run in Triton's interpreter, in a fresh process.

The cases themselves are in triton_cases.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmhybrid.ops.selective_scan import available_backends, choose_backend, fused

FOLDER = Path(__file__).parent


def run_cases(*selection):
    """Run triton_cases.py under the interpreter; return how many cases passed."""
    pytest.importorskip('triton', reason='the Triton scan needs Triton')
    if not torch.cuda.is_available() and 'Triton is' in (fused.problem() or ''):
        pytest.skip(fused.problem())
    command = [sys.executable, '-m', 'pytest', '-q', '-rf', '-p', 'no:cacheprovider', *selection]
    environment = os.environ | {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*command, str(FOLDER / 'triton_cases.py')],
        env=environment,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert 'skipped' not in summary, summary
    return int(re.search(r'(\d+) passed', summary)[1])


def test_values_and_gradients():
    assert run_cases('-m', 'not slow', '-k', 'pairwise') >= 20


def test_properties_and_operators():
    assert run_cases('-m', 'not slow', '-k', 'not pairwise') >= 15


@pytest.mark.slow
def test_full_product():
    assert run_cases('-m', 'slow') >= 1000


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
