"""What calls of the scan and of the mixers cost the host, counted without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmhybrid.ops import triton_support
from mmhybrid.ops.selective_scan import launch

pytest.importorskip('triton', reason='the kernels need Triton')
if launch.unknown_launchers() or triton_support.interpreting():
    pytest.skip('launches of this Triton are its own', allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / 'tools' / 'benchmark' / 'host.py'
_spec = importlib.util.spec_from_file_location('host_script', SCRIPT)
sys.path.insert(0, str(SCRIPT.parent))
host = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(host)
sys.path.remove(str(SCRIPT.parent))


def run_stub(tmp_path, only):
    """What the script prints, as lines, and its exit code."""
    environment = os.environ | {'TRITON_CACHE_DIR': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, SCRIPT, '--stub', '--only', only], env=environment,
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    return run_stub(tmp_path_factory.mktemp('cache'), 'scan|walk')


def test_targets_are_kept(printed):
    *lines, last = printed
    (line,) = re.findall(r'^targets kept: scan: ([^;]*)', last)
    forward, both, allocations = map(int, re.findall(r'(\d+) \(at most', line))
    assert forward <= 60 and both <= 170 and allocations <= 2
    rows = [line.split() for line in lines if re.match('  forward.backward  ', line)]
    assert len(rows) == 3  # the scan, the scan in an order, and a convolution
    # The second has few chunks: no launch of a carry, and memory that goes with the forward pass.
    for row, expected in zip(rows, ((4, 7), (5, 6)), strict=False):
        calls, _, allocated, launches, as_operator = map(int, row[1:6])
        assert as_operator > 5 * calls and (allocated, launches) == expected
        assert float(row[6].rstrip('x')) > 1.5


def test_what_a_call_is_made_of(printed):
    """Every call has one purpose, and a known kind of call plans nothing."""
    rows = [line.split() for line in printed if re.match('  forward  ', line)]
    parts = [line for line in printed if line.startswith('  forward: ')]
    assert len(rows) == len(parts) == 3
    for row, line in zip(rows, parts, strict=True):
        found = {name: int(n) for name, n in re.findall(r'(\w+) (\d+) \(', line)}
        assert tuple(found) == host.PARTS
        assert found['planning'] == 0 and found['checks'] > 20 and found['binding'] > 3
        # Rounded, and of the profiler's own calls more or fewer.
        assert abs(sum(found.values()) - int(row[1])) <= 6


@pytest.mark.slow
def test_targets_of_mixers_are_kept(tmp_path):
    last = run_stub(tmp_path, 'Mixer|SS2D')[-1]
    assert last.startswith('targets kept: MambaVisionMixer: ') and last.count('at most') == 3 * 6


def test_a_missed_target_is_said():
    good = host.Count(60, 0, 2, 8, {})
    found = dict.fromkeys(('no grad', 'forward', 'backward', 'forward+backward'), good)
    assert host.verdict({'scan': found}) == (
        True, 'targets kept: scan: forward calls 60 (at most 60), forward+backward calls 60 '
        '(at most 170), backward allocations 2 (at most 2)')
    for kind, worse in (('no grad', good._replace(calls=61)), ('forward', good._replace(calls=61)),
                        ('forward+backward', good._replace(calls=171)),
                        ('backward', good._replace(allocations=3))):
        kept, line = host.verdict({'scan': found | {kind: worse}, 'SS2D': found})
        assert not kept and line.startswith('targets MISSED: scan: ') and '; SS2D: ' in line
        assert not host.verdict({'SS2D': found, 'scan': found | {kind: worse}})[0]
    assert set(host.TARGETS) == set(host.WORKS)


def test_calls_are_counted():
    def run():
        return max(1, 2) + sub()

    def sub():
        return len('ab')

    found = host.count_calls(run)
    assert found.total() == 4 and found['max'] == found['len'] == 1
