"""Runs a file of test cases of the Triton kernels: compiled with a GPU, else interpreted.

Triton decides when it is imported whether kernels are compiled or interpreted, so such cases run in
a fresh process; their file's name (`*_cases.py`) keeps pytest from collecting it otherwise.
MMHYBRID_TEST_DEVICE=cpu takes the interpreter on a machine with a GPU, too.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmhybrid.ops import triton_support

ROOT = Path(__file__).parents[1]
VARIABLE = 'MMHYBRID_TEST_DEVICE'


def test_device():
    """Kind of device that tests compute on: that of the variable, else a GPU if there is one."""
    wish = os.environ.get(VARIABLE) or ('cuda' if torch.cuda.is_available() else 'cpu')
    assert wish in ('cpu', 'cuda'), f'{VARIABLE}={wish}, expected cpu or cuda'
    assert wish == 'cpu' or torch.cuda.is_available(), f'{VARIABLE}=cuda, and PyTorch sees no GPU'
    return wish


test_device.__test__ = False  # a helper, whatever its name says
DEVICE = test_device()


def begin_cases():
    """In a file of cases: tensors are made on the device from here on."""
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    assert interpreted == (DEVICE == 'cpu'), 'cases are run by the tests that name their file'
    torch.set_num_threads(1)
    if DEVICE == 'cuda':
        torch.set_default_device(DEVICE)
        torch.backends.cudnn.allow_tf32 = False  # the cases compare with float64
    else:
        quicken_interpreter()


def quicken_interpreter():
    """Do once what the interpreter does at every call of a device function and at every value.

    It goes through all of Triton's language to replace what computes, and lists all dtypes to name
    one: more than half of its time with the small blocks of tests.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    for module in (tl, tl.core):
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={'tl': module}))
    # what newer Tritons put back after a launch is empty now: all stays replaced
    interpreter._patch_lang = lambda fn: scope and type(scope)()
    find, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = np_dtype


def generator(seed):
    """Random numbers on the device of the cases."""
    return torch.Generator(DEVICE).manual_seed(seed)


def run_cases(path, *selection):
    """Run the cases of a file, selected by pytest's options; return how many passed."""
    pytest.importorskip('triton', reason='the kernels need Triton')
    reason = triton_support.unavailable_reason()
    if reason and (DEVICE == 'cuda' or 'Triton is' in reason):
        pytest.skip(reason)
    command = [sys.executable, '-m', 'pytest', '-q', '-rf', '-p', 'no:cacheprovider', *selection]
    environment = os.environ | {'OMP_NUM_THREADS': '1', VARIABLE: DEVICE}
    if DEVICE == 'cpu':
        environment['TRITON_INTERPRET'] = '1'
    elif importlib.util.find_spec('xdist'):  # kernels take long to compile
        command += ['-n', str(min(10, os.cpu_count() or 1))]
    done = subprocess.run(
        [*command, str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert 'skipped' not in summary, summary
    return int(re.search(r'(\d+) passed', summary)[1])
