"""The benchmark of the scan: its floors, its gate, and that it runs where there is no GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'tools' / 'benchmark'


@pytest.fixture
def ops(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as for a script that is run by its path
    import ops

    yield ops
    for name in ('ops', 'timing'):
        sys.modules.pop(name)


def test_floor_of_a_detection_call(ops):
    shape = next(s for s in ops.GPU_SHAPES if s.name == 'detection MambaVision-T s3')
    # 2 x 12544 x 160 x (8 + 2) exponentials at 4.18 T/s; the backward pass adds 94 operations.
    forward = ops.floor_ms(shape, torch.bfloat16, False, 'NVIDIA H200')
    assert forward == pytest.approx(40.14e6 / 4.18e9, rel=1e-3)
    both = ops.floor_ms(shape, torch.bfloat16, True, 'NVIDIA H200')
    assert both - forward == pytest.approx(4.014e6 * 94 / 33.4e9, rel=1e-3)
    assert ops.floor_ms(shape, torch.bfloat16, False, 'some other GPU') is None


def run(*arguments):
    command = [sys.executable, str(FOLDER / 'ops.py'), '--device', 'cpu', *arguments]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_script_runs_on_a_cpu(tmp_path):
    results, picture = tmp_path / 'rows.csv', tmp_path / 'scan.png'
    done = run('--small', '--only', 'uneven', '--rounds', '3', '--csv', str(results),
               '--plot', str(picture), '--backends', 'reference,torch', '--require', 'torch=0.001')
    assert done.returncode == 0, done.stdout + done.stderr
    with open(results, newline='') as file:
        rows = list(csv.DictReader(file))
    found = [(row['backend'], row['pass'], row['mode'], row['turns']) for row in rows]
    assert found == [(backend, what, 'eager', '3') for what in ('forward', 'forward+backward')
                     for backend in ('reference', 'torch')]
    for row in rows:
        assert float(row['p20_ms']) <= float(row['p50_ms']) <= float(row['p80_ms'])
        assert row['device'] and row['commit'] and row['clock'] == 'wall'
        assert float(row['error_gradient']) < 4e-6 and not row['floor_ms']
    assert rows[0]['reference_over_this'] == '1.00'
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_a_backend_that_is_too_slow_fails():
    done = run('--shape', '1,16,4,2', '--rounds', '1', '--backends', 'reference,torch',
               '--passes', 'forward', '--require', 'torch=1e6')
    assert done.returncode == 1 and 'TOO SLOW' in done.stdout, done.stdout + done.stderr


def test_a_wrong_backend_is_not_timed(ops, capsys):
    ops.TOLERANCE = dict.fromkeys(ops.TOLERANCE, 0.0)
    threads = torch.get_num_threads()
    try:
        code = ops.main(['--device', 'cpu', '--small', '--rounds', '1', '--backends', 'torch'])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert code == 1 and printed.count(ops.WRONG) == 2 and 'p50_ms' not in printed


def test_a_backend_that_raises_costs_nothing_else(ops, monkeypatch, tmp_path, capsys):
    def broken(**inputs):
        raise RuntimeError('no kernel image is available')

    found = ops.find_backends('cpu', ['torch'])
    monkeypatch.setattr(ops, 'find_backends', lambda *_: {'triton': broken, **found})
    path = tmp_path / 'rows.csv'
    threads = torch.get_num_threads()
    try:
        code = ops.main(['--device', 'cpu', '--small', '--rounds', '1', '--csv', str(path)])
        stopped = ops.main(['--device', 'cpu', '--small', '--minutes', '0'])
    finally:
        torch.set_num_threads(threads)
    with open(path, newline='') as file:
        rows = [(row['shape'], row['backend'], row['mode']) for row in csv.DictReader(file)]
    assert code == 1 and rows == [
        row for shape in ('even', 'uneven')
        for row in ((shape, 'triton', ops.FAILED), *[(shape, 'torch', 'eager')] * 2)]
    printed = capsys.readouterr().out
    assert 'FAILED even: triton: RuntimeError: no kernel image is available' in printed
    assert stopped == 0 and 'not measured, 0 minutes have passed: uneven' in printed


def test_arguments_are_checked(ops, capsys):
    with pytest.raises(SystemExit):
        ops.parse_args(['--device', 'cpu', '--clock', 'cuda'])
    assert '--clock cuda does not measure --device cpu' in capsys.readouterr().err
    with pytest.raises(SystemExit, match="got 'fast', expected triton"):
        ops.find_backends('cpu', ['fast'])


def test_kept_results_have_the_columns_of_the_script(ops):
    for path in sorted((FOLDER / 'results').glob('selective_scan*.csv')):
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
        assert rows and tuple(rows[0]) == ops.COLUMNS, path
        for row in rows:
            assert float(row['p20_ms']) <= float(row['p50_ms']) <= float(row['p80_ms'])
