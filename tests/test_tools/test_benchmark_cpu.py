"""The benchmark of a CPU against an older version: both versions, the gate, and its errors."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmark'))
    return importlib.import_module('cpu')


class Stub:
    """A version that takes a known time and gives known maps."""

    seconds = {'old': 0.3, 'new': 0.2}
    values = {'old': 1.0, 'new': 1.0}

    def __init__(self, folder, model, what, args, maps):
        self.maps, self.name = maps, maps.stem
        torch.save([torch.full((2,), self.values[self.name])], maps)

    def answer(self):
        return self.call()

    def call(self):
        return self.seconds[self.name]

    def close(self):
        pass


def test_the_ratio_is_the_older_time_by_the_newer(cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, 'Version', Stub)
    path = tmp_path / 'cpu.csv'
    done = cpu.main(['--against', str(ROOT), '--models', 'Vim:tiny', '--threads', '1', '--turns',
                     '3', '--csv', str(path)])
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert done == 0 and tuple(row) == cpu.COLUMNS and 'ratio 1.5 ' in capsys.readouterr().out
    assert (row['against_p50_ms'], row['p50_ms'], row['ratio']) == ('300', '200', '1.5')
    assert (row['model'], row['threads'], row['turns'], row['W']) == ('Vim:tiny', '1', '3', '512')


def test_versions_that_disagree_are_not_timed(cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, 'Version', Stub)
    monkeypatch.setitem(Stub.values, 'new', 1.1)
    path = tmp_path / 'cpu.csv'
    done = cpu.main(['--against', str(ROOT), '--models', 'Vim:tiny', '--csv', str(path)])
    assert done == 1 and not path.exists()
    assert f'maps of Vim:tiny differ by 1.0e-01 from those of {ROOT}' in capsys.readouterr().out


def test_what_is_no_version_is_refused(cpu, tmp_path):
    with pytest.raises(SystemExit, match='--against no-such-commit is neither a folder with mmhyb'):
        cpu.folder_of('no-such-commit', tmp_path)
    assert cpu.folder_of(str(ROOT), tmp_path) == ROOT


@pytest.mark.slow
def test_arguments_reach_the_model(cpu, tmp_path):
    path = tmp_path / 'cpu.csv'
    model = 'MambaVision:tiny:window_size=(8,8,3,2):windows="tight":out_indices=(0,2)'
    done = cpu.main(['--against', str(ROOT), '--models', model, '--size', '64', '96', '--threads',
                     '1', '--turns', '1', '--clock', 'cpu', '--csv', str(path)])
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert done == 0 and row['model'] == model and float(row['error']) == 0


@pytest.mark.slow
def test_end_to_end(cpu, tmp_path):
    path = tmp_path / 'cpu.csv'
    done = cpu.main(['--against', str(ROOT), '--models', 'VMamba:tiny', '--passes', *cpu.PASSES,
                     '--size', '32', '48', '--threads', '1', '--turns', '2', '--clock', 'cpu',
                     '--csv', str(path)])
    rows = [*csv.DictReader(path.read_text().splitlines())]
    assert done == 0 and [row['pass'] for row in rows] == [*cpu.PASSES]
    assert all(float(row['error']) == 0 and float(row['ratio']) > 0 for row in rows)
