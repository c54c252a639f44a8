"""What a call of the scan costs the host, counted without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmhybrid.ops import triton_support

pytest.importorskip('triton', reason='the kernels need Triton')
if 'Triton is' in (triton_support.unavailable_reason() or '') or triton_support.interpreting():
    pytest.skip('this Triton cannot compile the scan', allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / 'tools' / 'benchmark' / 'host.py'
_spec = importlib.util.spec_from_file_location('host_script', SCRIPT)
sys.path.insert(0, str(SCRIPT.parent))
host = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(host)
sys.path.remove(str(SCRIPT.parent))


def test_targets_are_kept(tmp_path):
    environment = os.environ | {'TRITON_CACHE_DIR': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, SCRIPT, '--stub', '--only', 'scan'], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *lines, last = done.stdout.strip().splitlines()
    forward, both, allocations = map(int, re.findall(r'(\d+) \(at most', last))
    assert 'kept' in last and forward <= 60 and both <= 170 and allocations <= 2
    rows = [line.split() for line in lines if 'forward+backward ' in line]
    assert len(rows) == 2  # the scan, and the scan in an order
    for row in rows:
        calls, allocated, launches, as_operator = map(int, row[1:5])
        assert as_operator > 5 * calls and launches == 8 and allocated == 4
        assert float(row[5].rstrip('x')) > 1.5


def test_a_missed_target_is_said():
    good = host.Count(60, 2, 8, {})
    found = dict.fromkeys(('forward', 'backward', 'forward+backward'), good)
    assert host.verdict(found) == (
        True, 'targets of the scan kept: forward calls 60 (at most 60), forward+backward calls 60 '
        '(at most 170), backward allocations 2 (at most 2)')  # fmt: skip
    for kind, worse in (('forward', good._replace(calls=61)),
                        ('forward+backward', good._replace(calls=171)),
                        ('backward', good._replace(allocations=3))):  # fmt: skip
        kept, line = host.verdict(found | {kind: worse})
        assert not kept and 'MISSED' in line


def test_calls_are_counted():
    def run():
        return max(1, 2) + sub()

    def sub():
        return len('ab')

    found = host.count_calls(run)
    assert found.total() == 4 and found['max'] == found['len'] == 1
