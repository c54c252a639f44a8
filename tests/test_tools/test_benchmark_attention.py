"""attention.py: what it compares, what it leaves out, and that a wrong variant is not timed."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / 'tools' / 'benchmark'
SMALL = ['--device', 'cpu', '--small', '--only', 'uneven', '--rounds', '1', '--threads', '1']


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('attention')


def rows_of(attention, tmp_path):
    path = tmp_path / 'rows.csv'
    code = attention.main([*SMALL, '--csv', str(path)])
    with open(path, newline='') as file:
        return code, list(csv.DictReader(file))


def test_rows(attention, tmp_path):
    code, rows = rows_of(attention, tmp_path)
    assert code == 0
    timed = {(row['variant'], row['pass']) for row in rows if row['p50_ms']}
    for name in ('default', 'math', 'padded to 56', 'padded to 64'):
        assert {(name, what) for what in attention.PASSES} <= timed
    assert {row['width'] for row in rows} == {'49'}
    # A CPU has none of the kernels of cuDNN.
    assert [row['mode'] for row in rows if row['variant'] == 'cudnn'] == [attention.REFUSED]


def test_a_wrong_variant_is_not_timed(attention, tmp_path, monkeypatch):
    """Padding without the scale of the true width."""
    right = attention.attend_padded
    monkeypatch.setattr(attention, 'attend_padded',
                        lambda qkv, width: right(qkv * 1.02, width) / 1.02)
    code, rows = rows_of(attention, tmp_path)
    padded = [row for row in rows if row['variant'].startswith('padded')]
    assert code == 1 and len(padded) == 2
    assert all(row['mode'] == attention.WRONG and not row['p50_ms'] for row in padded)


def test_shapes_are_those_of_the_models(attention):
    from mmhybrid.models.backbones.mambavision import ARCHITECTURES

    for shape in attention.GPU_SHAPES:
        size, stage = shape.name.removeprefix('MambaVision-').split(' s')
        name = dict(T='tiny', S='small', B='base', L='large')[size]
        arch, i = ARCHITECTURES[name], int(stage) - 1
        assert shape.heads == arch['num_heads'][i]
        assert shape.width * shape.heads == arch['dim'] * 2**i
        assert shape.length == {2: 112, 3: 56}[i] ** 2


def test_heads_of_a_multiple_of_eight_are_not_padded(attention):
    assert not any('padded' in name for name in attention.variants(attention.GPU_SHAPES[0]))
    assert 'math' not in attention.variants(attention.GPU_SHAPES[0])  # 2.5e9 scores


def test_the_exact_form(attention):
    qkv = torch.randn(1, 600, 3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(attention.exact(qkv, 2), attention.attend(qkv))
