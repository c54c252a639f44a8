"""``mmhybrid reproduce`` runs what it names; the commands run, at small sizes."""
import csv
import importlib
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from small_runs import quick
from torch.torch_version import TorchVersion

from mmhybrid import cli
from mmhybrid.analysis.pretended_gpu import MINIMUM_TORCH
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_imagenet import write_mini_imagenet
from mmhybrid.errors import UserError
from mmhybrid.papers import find_claim, read_papers, running
from mmhybrid.papers.running import chosen_rows, run_rows, words_of

ROOT = Path(__file__).resolve().parents[2]
PAPERS = read_papers()
COUNTS_MEMORY = torch.__version__ >= TorchVersion('.'.join(map(str, MINIMUM_TORCH)))
SMALL = sorted(path.stem for path in (ROOT / 'configs/ablations').glob('*_mini_ade20k.py'))
QUICK = 'localvmamba_spatial_attention_mini_ade20k'
STEPS = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2',
         'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
         'val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False',
         'train_dataloader.batch_size=2']


def test_rows_that_run():
    figure = find_claim(PAPERS, 'vim/figure-1')
    rows = chosen_rows(figure, None)
    assert [row.command for row in rows] == [
        row.command for row in dict((r.command, r) for r in figure.rows
                                    if r.state == 'runs here').values()]
    table = find_claim(PAPERS, 'vmamba/table-1')
    with pytest.raises(UserError, match='Nothing of vmamba/table-1 runs on any machine: needs Im'):
        chosen_rows(table, None)
    with pytest.raises(UserError, match="has no row 'VMamba-X'; its rows are 'VMamba-T', "):
        chosen_rows(table, 'VMamba-X')
    with pytest.raises(UserError, match='13 other networks of .* has no command: not built'):
        chosen_rows(table, '13 other networks')


def test_commands_find_our_files_from_any_folder():
    words = words_of("mmhybrid test configs/upernet_vmamba_t_ade20k.py 'a b.pth'", ['--tta'])
    assert words[:4] == [sys.executable, '-m', 'mmhybrid', 'test']
    assert Path(words[4]).is_file() and words[5:] == ['a b.pth', '--tta']
    words = words_of('python tools/benchmark/pareto.py --batch 1', [])
    assert words[0] == sys.executable and Path(words[1]).is_file()


@pytest.mark.parametrize(('codes', 'status', 'ran'), [
    ((0, 0), 0, 2), ((0, 3), 3, 2), ((1, 0), 1, 1), ((-2, 0), 130, 1)])
def test_the_first_failure_is_the_status(codes, status, ran, monkeypatch, capfd):
    """Of a command that a signal ended it is 128 and the signal."""
    left = list(codes)
    monkeypatch.setattr(running.subprocess, 'run',
                        lambda words: SimpleNamespace(returncode=left.pop(0)))
    row = find_claim(PAPERS, 'vmamba/table-2').rows[0]
    assert run_rows([row, row], ['--data-root', 'my data']) == status
    assert capfd.readouterr().out.count(f"$ {row.command} --data-root 'my data'") == ran


@pytest.mark.parametrize('arguments', [
    [], ['--list', '--page', 'x.md'], ['vim/figure-1', '--list']])
def test_one_thing_at_a_time(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(['reproduce', *arguments])
    assert end.value.code == 2
    assert 'expected one of CLAIM, --list and --page' in capsys.readouterr().err


def test_a_claim_runs(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['reproduce', 'vim/table-1', '--show']) == 0
    assert 'vim/table-1: ImageNet-1K' in capfd.readouterr().out
    assert cli.main(['reproduce', 'vmamba/figure-3', '--with', '--depth', '0']) == 0
    said = capfd.readouterr().out
    assert '$ mmhybrid flops VMambaClassifier:tiny --shape 224 --depth 0' in said
    assert '30,249,064' in said or '30.249' in said


def script(name):
    """A module of tools/benchmark, which finds its neighbours beside itself."""
    sys.path.insert(0, str(ROOT / 'tools/benchmark'))
    try:
        return importlib.import_module(name)
    finally:
        del sys.path[0]


def test_resolutions(tmp_path, monkeypatch, capsys):
    resolutions = script('resolutions')
    monkeypatch.chdir(tmp_path)
    argv = ['--csv', 'a.csv', '--plot', 'a.png', '--device', 'cpu', '--sizes', '41', '--turns', '1']
    assert resolutions.main([*argv, '--fpn']) == 0
    rows = list(csv.DictReader(open('a.csv')))
    assert [(row['model'], row['size'], row['tokens']) for row in rows] == [
        (f'{model} tiny', '41', '4') for model in resolutions.MODELS]
    assert all(float(row['images_per_s']) > 0 and row['counted_GMACs'] for row in rows)
    assert rows[1]['counted_GMACs'] == rows[2]['counted_GMACs']  # fused attention costs the same
    said = capsys.readouterr().out
    assert re.search(r'at 41 pixels:\n  against DeiT: Vim is [\d.]+ times as fast', said)
    if COUNTS_MEMORY:
        assert 'times as fast, takes ' in said and all(row['counted_MB'] for row in rows)
    else:
        assert 'memory is not counted: a pretended GPU needs torch' in said
    assert Path('a.png').stat().st_size > 1000
    with pytest.raises(SystemExit):
        resolutions.main(['--sizes', '16'])


def test_pareto(tmp_path, monkeypatch):
    pareto = script('pareto')
    monkeypatch.chdir(tmp_path)
    argv = ['--csv', 'b.csv', '--plot', 'b.png', '--device', 'cpu']
    assert pareto.main([*argv, '--only', '^Vim-T|ConvNeXt-T', '--size', '32', '--turns', '1']) == 0
    rows = list(csv.DictReader(open('b.csv')))
    assert [(row['model'], row['published_top1']) for row in rows] == [
        ('Vim-T', '76.1'), ('ConvNeXt-T', '82.0')]
    assert Path('b.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match='matches none of MambaVision-T, '):
        pareto.main(['--only', 'nothing'])


@pytest.mark.skipif(not COUNTS_MEMORY, reason='memory is counted with a newer torch')
def test_the_claim_at_its_own_size_counted():
    """Cost is what the published networks have; DeiT's matrices of attention are counted."""
    resolutions = script('resolutions')
    macs = {model: resolutions.counted_macs(model, 'tiny', 1248, False)
            for model in resolutions.MODELS}
    assert f"{macs['Vim'] / 1e9:.1f}, {macs['DeiT'] / 1e9:.0f}" == '56.3, 204'
    size = {model: resolutions.counted_bytes(model, 'tiny', 1248, False, 64)
            for model in resolutions.MODELS}
    tokens = 78 * 78 + 1
    two_matrices = 2 * 64 * 3 * tokens * tokens * 4
    assert two_matrices < size['DeiT'] < 1.1 * two_matrices
    assert size['DeiT fused'] < size['Vim'] < size['DeiT'] / 4


@pytest.mark.parametrize('path', sorted((ROOT / 'configs/ablations').glob('*_imagenet.py')),
                         ids=lambda path: path.stem)
def test_imagenet_ablations_build(path):
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        network = MODELS.build(cfg.model.backbone)
    assert len(network.layers) == 24 and network.layers[0].mixer.attn is None


def test_small_ablations_differ_in_what_they_say():
    """No two of them are the same network on the same recipe."""
    seen = {}
    for name in SMALL:
        cfg = Config.fromfile(ROOT / f'configs/ablations/{name}.py')
        network = MODELS.build(cfg.model.backbone)
        kinds = [type(m).__name__ + str(getattr(m, 'directions', '')) + str(
            (getattr(m, 'causal', ''), getattr(m, 'branch', ''))) for m in network.modules()]
        assert str(kinds) not in seen, f'{name} is {seen[str(kinds)]}'
        seen[str(kinds)] = name
        base = Config.fromfile(ROOT / 'configs/ablations/mambavision_mini_ade20k.py')
        assert cfg.train_cfg == base.train_cfg and cfg.optim_wrapper == base.optim_wrapper
        assert cfg.param_scheduler == base.param_scheduler and cfg.randomness == base.randomness


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'mini_ade20k'
    write_mini_ade20k(root, train=4, val=2)
    return root


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in SMALL])
def test_small_ablations_train(name, ade20k, tmp_path, capfd):
    command = f'mmhybrid train configs/ablations/{name}.py'
    assert any(row.command == command for paper in PAPERS for claim in paper.claims
               for row in claim.rows)
    argv = [str(ROOT / word) if word.startswith('configs/') else word
            for word in shlex.split(command)[1:]]
    with quick():
        assert cli.main([*argv, '--work-dir', str(tmp_path), '--data-root', str(ade20k),
                         '--cfg-options', *STEPS]) == 0
    assert (tmp_path / 'iter_2.pth').is_file()
    assert 'mIoU' in ''.join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['localvmamba_mini_imagenet', 'localvmamba_s_search_imagenet'])
def test_searches_run(name, tmp_path):
    data = tmp_path / 'mini_imagenet'
    write_mini_imagenet(data, train=10, val=5)
    options = ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=5',
               'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
    if '_s_' in name:  # a thumbnail of the published search
        options += ['model.num_classes=5', 'model.backbone.arch.dim=8',
                    'train_dataloader.batch_size=4',
                    'train_dataloader.dataset.pipeline.1.input_size=32']
    with quick():
        assert cli.main(['search', str(ROOT / f'configs/classification/{name}.py'), '--data-root',
                         str(data), '--work-dir', str(tmp_path / 'work'), '--cfg-options',
                         *options]) == 0
