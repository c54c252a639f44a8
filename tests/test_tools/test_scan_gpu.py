"""The GPU benchmark of the scan: its floors, and that the script runs where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools' / 'benchmark' / 'scan_gpu.py'


def load():
    spec = importlib.util.spec_from_file_location('scan_gpu', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_floor_of_a_detection_call():
    module = load()
    shape = next(s for s in module.SHAPES if s.name == 'detection MambaVision-T s3')
    # 2 x 12544 x 160 x (8 + 2) exponentials at 4.18 T/s; the backward pass adds 94 operations.
    forward = module.floor_us(shape, torch.bfloat16, False, 'NVIDIA H200')
    assert forward == pytest.approx(40.14e6 / 4.18e6, rel=1e-3)
    both = module.floor_us(shape, torch.bfloat16, True, 'NVIDIA H200')
    assert both - forward == pytest.approx(4.014e6 * 94 / 33.4e6, rel=1e-3)
    assert module.floor_us(shape, torch.bfloat16, False, 'some other GPU') is None


def run(*arguments):
    command = [sys.executable, str(SCRIPT), '--device', 'cpu', *arguments]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_script_runs_on_a_cpu():
    done = run('--dtype', 'float32', '--rounds', '2', '--only', 'uneven')
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('shape uneven')]
    assert sum('backend torch  pass forward' in line for line in lines) == 2
    assert all('p50_us' in line and 'error_gradient' in line for line in lines)


def test_no_cpu_times_in_the_results():
    done = run('--csv', 'results.csv')
    assert done.returncode == 2 and 'times of a GPU' in done.stderr


def test_a_wrong_backend_is_not_timed():
    module = load()
    module.TOLERANCE = dict.fromkeys(module.TOLERANCE, 0.0)
    rows = module.measure(module.SMALL[1], torch.float32, 'cpu', 2)
    assert rows and all(row['mode'] == 'wrong, not timed' and 'p50_us' not in row for row in rows)
