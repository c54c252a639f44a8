"""What the benchmark scripts share."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location('timing', ROOT / 'tools' / 'benchmark' / 'timing.py')
timing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(timing)


def test_works_take_turns():
    seen = []
    works = {
        'a': timing.in_sequence([lambda: seen.append('a')] * 2),
        'b': timing.in_sequence([lambda: seen.append('b')]),
    }
    times = timing.take_turns(works, 3, 'wall')
    assert ''.join(seen) == 'aabaabaab'
    assert all(len(values) == 3 and min(values) > 0 for values in times.values())


def test_turns_end_when_their_time_is_up():
    works = {name: timing.in_sequence([lambda: None]) for name in 'ab'}
    times = timing.take_turns(works, 10**9, 'wall', seconds=0)
    assert [len(values) for values in times.values()] == [1, 1]


def test_a_failure_is_noted_and_the_rest_goes_on(capsys):
    failures = timing.Failures()
    with failures.noted('first'):
        raise RuntimeError('out of memory\nand much more')
    with failures.noted('second'):
        after = True
    assert after and failures == ['first']
    assert capsys.readouterr().out == 'FAILED first: RuntimeError: out of memory\n'
    with pytest.raises(SystemExit), failures.noted('bad argument'):
        raise SystemExit('expected another')


def test_a_broken_gpu_ends_the_run(monkeypatch):
    def synchronize():
        raise RuntimeError('an illegal memory access was encountered')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    with pytest.raises(SystemExit, match=r'illegal.*leave triton out'), \
            timing.Failures().noted('triton'):
        raise ValueError


def test_nothing_begins_after_the_limit(capsys):
    assert timing.TimeLimit(0).passed('seg') and not timing.TimeLimit(None).passed('det')
    assert capsys.readouterr().out == 'not measured, 0 minutes have passed: seg\n'


def test_percentiles_in_milliseconds():
    values = timing.percentiles([x / 1000 for x in range(1, 12)])
    assert values == {'turns': '11', 'p20_ms': '3', 'p50_ms': '6', 'p80_ms': '9'}
    assert timing.percentiles([0.5])['p80_ms'] == '500'


def test_rows_say_where_and_fit_their_file(tmp_path):
    path = tmp_path / 'new' / 'rows.csv'
    columns = (*timing.ENVIRONMENT, 'what', *timing.PERCENTILES)
    row = timing.environment('cpu', 'wall') | timing.percentiles([0.25]) | {'what': 'x'}
    for _ in range(2):
        timing.append_rows(path, columns, [row])
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and rows[0] == rows[1] == row
    assert rows[0]['torch'] == torch.__version__ and rows[0]['device'] and rows[0]['commit']
    with pytest.raises(ValueError, match='other columns.*what'):
        timing.append_rows(path, columns[:-5], [])


def test_saved_bytes_count_every_storage_once():
    weight = torch.ones(3, requires_grad=True)
    x = torch.ones(100, 3, requires_grad=True)

    def call():
        y = x * weight  # keeps x and the weight
        return y * y  # keeps y once

    assert timing.saved_bytes(call, [weight]) == 2 * 100 * 3 * 4
    assert timing.saved_bytes(call) == 2 * 100 * 3 * 4 + 3 * 4


def test_clocks_and_sets_follow_the_device():
    assert timing.default_clock('cpu') == 'wall' and timing.default_clock('cuda:1') == 'cuda'
    assert timing.input_sets(1 << 20, 'cpu') == 1
    assert timing.input_sets(1 << 26, 'cuda') == 2 and timing.input_sets(1, 'cuda') == 16
