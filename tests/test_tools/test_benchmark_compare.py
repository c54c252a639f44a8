"""Another module against ours: weights, outputs first, turns; with a stand-in on a CPU."""

import csv
import importlib
from pathlib import Path

import pytest

from mmhybrid.cli.actions.running import run_command

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmark'
# The other module is one of ours under other names, whose first map can be changed.
FACTORY = """
import torch
from mmhybrid.models import VMamba

ARCH = dict(dim=8, depths=(1, 1, 1, 1))

class Other(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = VMamba(ARCH, drop_path_rate=0.0)
        self.unused = torch.nn.Parameter(torch.zeros(2))
        self.scale = scale

    def forward(self, x):
        first, *rest = self.trunk(x)
        return dict(maps=[first * self.scale, *rest])

def same(**changes):
    return dict(module=Other(), config='VMamba:tiny', options=dict(arch=ARCH, drop_path_rate=0.0),
                keys=[(r'^unused$', None), (r'^trunk\\.', '')]) | changes

def by_function():
    return same(keys=lambda name: name.removeprefix('trunk.') if name != 'unused' else None)

def other_values():
    return same(module=Other(1.5))

def not_a_number():
    return same(module=Other(float('nan')))

def left_over():
    return same(keys=[(r'^trunk\\.', '')])

def missing():
    return same(keys=[(r'^unused$|patch_embed', None), (r'^trunk\\.', '')])

def twice():
    return same(keys=lambda name: 'a')

def fewer_maps():
    module = Other()
    module.forward = lambda x: module.trunk(x)[:2]
    return same(module=module)

def nothing():
    return None

def a_function():
    return same(module=len)

number = 3
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('compare')


@pytest.fixture
def run(compare, tmp_path, capfd):
    (tmp_path / 'mine.py').write_text(FACTORY)

    def run(name, *more):
        code = run_command(compare.main, [
            '--factory', str(tmp_path / name) if ':' in name else name, '--size', '32', '48',
            '--batch', '1', '--device', 'cpu', '--turns', '3', *more])
        said = capfd.readouterr()
        assert 'Traceback' not in said.err
        return code, said.out, said.err

    return run


@pytest.mark.parametrize('name', ['same', 'by_function'])
def test_a_stand_in(compare, run, tmp_path, name):
    path = tmp_path / 'rows.csv'
    code, out, err = run(f'mine.py:{name}', '--csv', str(path))
    assert code == 0, err
    assert 'same outputs' in out
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == compare.COLUMNS
    assert [(row['pass'], row['module'], row['turns']) for row in rows] == [
        (what, module, '3') for what in compare.PASSES for module in ('theirs', 'ours')]
    for row in rows:
        assert row['case'] == name and float(row['error']) < 1e-5 and row['mode'] == 'eager'
        assert float(row['theirs_over_this']) > 0
        assert row['module'] == 'ours' or row['theirs_over_this'] == '1.000'


def test_turns_alternate(compare, monkeypatch):
    seen = []

    class Module:
        def __init__(self, name):
            self.name = name

        def train(self, mode):
            return self

    monkeypatch.setattr(compare, 'step', lambda m, *_: lambda: seen.append(m.name))
    monkeypatch.setattr(compare, 'peak_megabytes', lambda *_: '')
    args = compare.parse(['--factory', 'a:b', '--device', 'cpu', '--passes', 'forward',
                          '--turns', '3'])
    modules = {name: Module(name) for name in ('theirs', 'ours')}
    assert len(list(compare.measure(args, modules, {}, compare.Failures()))) == 2
    assert seen[2:] == ['theirs', 'ours'] * 3  # after one call of each


@pytest.mark.parametrize(('name', 'message'), [
    ('other_values', 'the outputs differ by'), ('not_a_number', 'the outputs differ by nan'),
    ('left_over', 'unused (theirs: unused): ours has none of this name'),
    ('missing', 'ours has it, theirs gives none'),
    ('twice', "'keys' turns both unused and trunk."),
    ('fewer_maps', 'so that both return the same'),
    ('nothing', "returned NoneType, expected a dictionary with 'module' and 'config'"),
    ('a_function', "'module' is a builtin_function_or_method, expected a torch.nn.Module"),
    ('number', 'has no function number'), ('absent', 'has no function absent'),
])
def test_nothing_is_timed(run, name, message):
    code, out, err = run(f'mine.py:{name}')
    assert code == 1 and message in err and 'p50_ms' not in out, err


@pytest.mark.parametrize(('spec', 'message'), [
    ('mine.py', "got 'mine.py', expected FILE:FUNCTION"),
    ('other.py:same', 'there is no file'),
])
def test_factories_that_are_not_there(run, spec, message):
    code, _, err = run(spec)
    assert code == 1 and message in err


def test_differences_may_be_allowed(run):
    code, out, err = run('mine.py:other_values', '--tolerance', '1', '--passes', 'forward')
    assert code == 0 and 'module ours' in out, err
