"""The benchmark of whole backbones: end to end on a CPU, and its gate."""

import csv
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmark'
STAGED = dict(arch=dict(dim=8, depths=(1, 1, 1, 1)))
SMALL = {'VMamba': STAGED, 'Vim': dict(arch=dict(dim=8, depth=2), out_indices=(1,))}
QUICK = ['--device', 'cpu', '--size', '32', '48', '--batch', '1', '--turns', '2',
         '--check-size', '32']


@pytest.fixture
def backbone(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('backbone')


def test_end_to_end(backbone, tmp_path, capsys):
    path = tmp_path / 'backbone.csv'
    done = backbone.main(
        [*QUICK, '--models', *SMALL, '--choices', 'torch,reference', '--csv', str(path), '--plot'],
        SMALL)
    assert done == 0 and path.with_suffix('.png').stat().st_size > 5000
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == backbone.COLUMNS
    assert [(r['model'], r['pass'], r['choice']) for r in rows] == [
        (model, what, choice) for model in SMALL for what in backbone.PASSES
        for choice in ('torch', 'reference')]
    for row in rows:
        assert row['mode'] == 'eager' and row['turns'] == '2' and row['commit'] and row['device']
        assert 0 < float(row['p20_ms']) <= float(row['p50_ms']) <= float(row['p80_ms'])
        assert float(row['images_per_s']) == pytest.approx(1e3 / float(row['p50_ms']), rel=1e-2)
        assert bool(row['saved_MB']) == (row['pass'] == 'forward+backward')
        assert float(row['error']) < 1e-4
    assert 'model Vim' in capsys.readouterr().out


def test_a_wrong_choice_is_not_timed(backbone, monkeypatch, capsys):
    errors = {'torch': 1.0, 'reference': 0.0}
    monkeypatch.setattr(backbone, 'error_of', lambda model, choice, *_: errors[choice])
    done = backbone.main([*QUICK, '--models', 'VMamba', '--passes', 'forward',
                          '--choices', 'torch,reference'], SMALL)
    out = capsys.readouterr().out
    assert done == 1 and 'VMamba: torch is wrong (error 1.0e+00) and is not timed' in out
    assert 'choice reference' in out and 'choice torch' not in out


def test_compiled(backbone, capsys):
    done = backbone.main([*QUICK, '--models', 'Vim', '--choices', 'torch', '--passes', 'forward',
                          '--modes', 'eager', 'compiled', '--compiler', 'eager'], SMALL)
    out = capsys.readouterr().out
    assert done == 0 and 'mode eager' in out and 'mode compiled' in out


def test_choices_reach_every_mixer(backbone):
    for name, arguments in SMALL.items():
        model = backbone.build(name, arguments)
        mixers = [m for m in model.modules() if hasattr(m, 'backend')]
        assert len(mixers) == (4 if name == 'VMamba' else 2)
        for choice in ('triton', 'torch'):
            backbone.choose(model, choice)
            assert {m.backend for m in mixers} == {choice}
        with pytest.raises(SystemExit, match=f'not a choice for {name}, .* take torch'):
            backbone.choose(model, 'torch-plain')
    hybrid = backbone.build('MambaVision', dict(arch=dict(
        dim=8, stem_width=4, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4),
        window_size=(8, 8, 4, 3))))
    mixers = [m for m in hybrid.modules() if hasattr(m, 'backend')]
    for choice, expected in (('torch-plain', ('torch', False)), ('triton', ('triton', 'auto'))):
        backbone.choose(hybrid, choice)
        assert {(m.backend, m.fused) for m in mixers} == {expected}


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--choices', 'fast'], 'fast is not a choice: expected a backend'),
    (['--models', 'VMmaba:tiny'], 'VMmaba is not a backbone of the registry'),
])
def test_mistakes(backbone, arguments, message):
    with pytest.raises(SystemExit, match=message):
        backbone.main([*QUICK, '--models', 'VMamba', *arguments], SMALL)


def test_what_a_cpu_cannot_do(backbone, capsys):
    for arguments, message in ((['--modes', 'graph'], 'needs a GPU'), (['--plot'], 'needs --csv')):
        with pytest.raises(SystemExit):
            backbone.main([*QUICK, *arguments])
        assert message in capsys.readouterr().err
