"""Runs a file of test cases under Triton's interpreter.

Triton decides when it is imported whether kernels are compiled or interpreted, so such cases run in
a fresh process; their file's name (`*_cases.py`) keeps pytest from collecting them otherwise.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmhybrid.ops import triton_support

ROOT = Path(__file__).parents[1]


def run_cases(path, *selection):
    """Run the cases of a file, selected by pytest's options; return how many passed."""
    pytest.importorskip('triton', reason='the kernels need Triton')
    if not torch.cuda.is_available() and 'Triton is' in (triton_support.unavailable_reason() or ''):
        pytest.skip(triton_support.unavailable_reason())
    command = [sys.executable, '-m', 'pytest', '-q', '-rf', '-p', 'no:cacheprovider', *selection]
    environment = os.environ | {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*command, str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert 'skipped' not in summary, summary
    return int(re.search(r'(\d+) passed', summary)[1])
