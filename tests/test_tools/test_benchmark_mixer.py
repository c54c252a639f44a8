"""The benchmark of the mixer: its floor, its gate, and that it runs where there is no GPU."""

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
def mixer(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as for a script that is run by its path
    import mixer

    yield mixer
    for name in ('mixer', 'timing'):
        sys.modules.pop(name)


def run(*arguments, **more):
    command = [sys.executable, str(FOLDER / 'mixer.py'), '--device', 'cpu', *arguments]
    environment = os.environ | {'PYTHONPATH': str(ROOT)} | more
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_script_runs_on_a_cpu(tmp_path):
    results, picture = tmp_path / 'rows.csv', tmp_path / 'mixer.png'
    done = run('--small', '--rounds', '2', '--csv', str(results), '--plot', str(picture),
               '--variants', 'plain reference,plain torch', '--threads', '1')
    assert done.returncode == 0, done.stdout + done.stderr
    with open(results, newline='') as file:
        rows = list(csv.DictReader(file))
    found = [(row['shape'], row['pass'], row['variant']) for row in rows]
    assert found == [(shape, what, variant) for shape in ('even', 'uneven')
                     for what in ('forward', 'forward+backward')
                     for variant in ('plain reference', 'plain torch')]
    for row in rows:
        assert float(row['p50_ms']) > 0 and float(row['error_gradient']) < 2e-5
        assert row['anchor'] == 'plain reference' and row['threads'] == '1'
        assert float(row['saved_bytes_per_token_and_channel']) > 10
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_fused_mixers_pass_the_gate_in_the_interpreter():
    pytest.importorskip('triton', reason='the fused mixer needs Triton')
    done = run('--small', '--only', 'uneven', '--rounds', '1', '--passes', 'forward', '--dtype',
               'bfloat16', '--variants', 'fused,plain torch', TRITON_INTERPRET='1')
    if 'Triton is' in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split('variant ')[1].split('  ')[0]: line for line in done.stdout.splitlines()
            if 'variant' in line}
    assert set(rows) == {'fused', 'plain torch'}

    def kept(name):
        return float(rows[name].split('saved_bytes_per_token_and_channel ')[1].split()[0])

    # With this few channels the step and B and C weigh almost 1 byte of it, and with this few
    # tokens the states between chunks another half; sizes of real models have a test beside the
    # operator.
    assert kept('fused') < 8.8 and kept('plain torch') > 10


def test_what_cannot_run_is_named(mixer, capsys):
    source = mixer.make_mixer(8, 'cpu')
    found = mixer.find_variants(source, 'cpu', ['fused', 'plain cuda', 'plain torch'])
    assert list(found) == ['plain torch'] and found['plain torch'].path(torch.ones(1, 2, 8))
    printed = capsys.readouterr().out
    assert 'fused is not timed: MambaVisionMixer was asked for fused=True, but' in printed
    assert 'plain mixer with the CUDA kernel of mamba_ssm is not timed: ' in printed
    with pytest.raises(SystemExit, match="got 'plain fast', expected 'fused'"):
        mixer.find_variants(source, 'cpu', ['plain fast'])


def test_another_scan_takes_the_place_of_ours(mixer):
    seen = {}

    def scan(u, delta, A, B, C, D, **more):
        seen.update(more, D=D)
        return u

    x = torch.randn(1, 4, 8)
    mixer.OtherScan(mixer.make_mixer(8, 'cpu'), scan)(x)
    assert seen['backend'] == 'torch' and seen['delta_softplus'] and seen['D'].shape == (4,)
    seen.clear()
    mixer.make_mixer(8, 'cpu')(x)
    assert not seen


def test_floor_and_gate(mixer, capsys):
    shape = next(s for s in mixer.GPU_SHAPES if s.name == 'detection MambaVision-T s3')
    assert shape[1:] == (2, 12544, 320)
    # 2 x 12544 x 160 x (8 + 2 + 4) exponentials at 4.18 T/s.
    floor = mixer.floor_ms(shape, torch.bfloat16, False, 'NVIDIA H200')
    assert floor == pytest.approx(56.2e6 / 4.18e9, rel=1e-3)
    assert mixer.floor_ms(shape, torch.bfloat16, True, 'some other GPU') is None
    mixer.TOLERANCE = dict.fromkeys(mixer.TOLERANCE, 0.0)
    threads = torch.get_num_threads()
    try:
        code = mixer.main(['--device', 'cpu', '--small', '--only', 'uneven', '--rounds', '1',
                           '--variants', 'plain torch', '--threads', '1'])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert code == 1 and mixer.WRONG in printed and 'p50_ms' not in printed


def test_kept_results_have_the_columns_of_the_script(mixer):
    paths = sorted((FOLDER / 'results').glob('mixer*.csv'))
    assert paths
    for path in paths:
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
        assert rows and tuple(rows[0]) == mixer.COLUMNS, path
        for row in rows:
            assert float(row['p20_ms']) <= float(row['p50_ms']) <= float(row['p80_ms'])
