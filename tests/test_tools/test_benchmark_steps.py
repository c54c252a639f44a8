"""steps.py: what it times, what it holds against the official backbones, and what it refuses."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / 'tools' / 'benchmark'


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('steps')


def test_rows(steps, tmp_path):
    path = tmp_path / 'rows.csv'
    code = steps.main(['--device', 'cpu', '--small', '--case', 'vmamba_t_seg', '--turns', '1',
                       '--csv', str(path)])
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert code == 0
    assert [(row['pass'], row['way']) for row in rows] == [(what, 'eager') for what in steps.PASSES]
    assert all(float(row['p50_ms']) > 0 and not row['official_ms'] for row in rows)


def test_official_times_are_those_of_the_same_gpu(steps):
    assert steps.official('some CPU') == {}
    found = steps.official('NVIDIA H200')
    assert found['mambavision_t_det', 'train step'] == 69.45
    assert {case for case, _ in found} <= set(steps.CASES)
    row = steps.against({'p50_ms': '20'}, found['vmamba_t_seg', 'train step'])
    assert row['official_over_this'] == '4.53'


def test_graphs_need_a_gpu(steps, capsys):
    with pytest.raises(SystemExit):
        steps.parse(['--device', 'cpu', '--ways', 'graphs'])
    assert 'need a GPU' in capsys.readouterr().err


def test_an_error_is_the_worst_tensor(steps):
    right = [torch.ones(4), torch.zeros(3), torch.full((2,), 2.0)]
    wrong = [torch.ones(4), torch.zeros(3), torch.full((2,), 2.5)]
    assert steps.error_of(right, right) == 0
    assert steps.error_of(wrong, right) == pytest.approx(0.25)
    with pytest.raises(AssertionError, match='2 tensors, expected 3'):
        steps.error_of(right[:2], right)
