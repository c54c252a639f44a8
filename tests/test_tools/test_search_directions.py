"""tools/search_directions.py: a search on a segmentor and a detector, from config to config."""
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.search import search
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.amp import has_accelerator
from mmhybrid.engine.search import choose_directions
from mmhybrid.ops.cross_scan import DIRECTIONS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    'seg': """_base_ = {base!r}
model = dict(
    backbone=dict(
        _delete_=True, type='mmhybrid.LocalVMamba', drop_path_rate=0.2, directions='unsearched',
        arch=dict(dim=8, depths=(1, 1, 1, 1), state_dim=2)),
    decode_head=dict(in_channels=[8, 16, 32, 64]), auxiliary_head=dict(in_channels=32))
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = []
""",
    'det': """_base_ = {base!r}
model = dict(
    backbone=dict(
        _delete_=True, type='MM_LocalVSSM', dims=8, depths=(1, 1, 1, 1), ssm_d_state=2,
        directions=[['h']] * 4, pretrained='imagenet.ckpt'),
    neck=dict(in_channels=[8, 16, 32, 64]))
"""}
BLOCKS = [f'layers.{stage}.blocks.0' for stage in range(4)]


@pytest.fixture(scope='module')
def toy(task, tmp_path_factory):
    """``toy(kind)``: as ``task``, with a LocalMamba backbone and a few iterations."""
    def make(kind):
        it, folder = task(kind), tmp_path_factory.mktemp(kind)
        config = folder / f'toy_{kind}.py'
        config.write_text(CONFIGS[kind].format(base=it.config))
        # drop path is in the config, so that the command line leaves the segmentor as it is
        keep = [text for text in it.options if 'drop_path' not in text]
        if kind == 'det':
            keep += ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=4',
                     'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
        return SimpleNamespace(**{**vars(it), 'config': str(config), 'options': keep,
                                  'data_options': ['--data-root', it.data], 'folder': folder,
                                  'interval': '2' if kind == 'seg' else '1',
                                  'last': 'iter_4.pth' if kind == 'seg' else 'epoch_1.pth'})
    return make


def run(it, work_dir, *more):
    return search([it.config, *it.data_options, '--work-dir', str(work_dir), '--interval',
                   it.interval, *more, *it.options])


@pytest.fixture(scope='module')
def searched_once(toy):
    """``searched_once(kind)``: kind, task, work directory and config of a search."""
    @cache
    def make(kind):
        it = toy(kind)
        return kind, it, it.folder / 'work', Path(run(it, it.folder / 'work'))
    return make


@pytest.fixture(params=['seg', 'det'])
def searched(request, searched_once):
    return searched_once(request.param)


def records(work_dir):
    return [json.loads(line) for line in (work_dir / 'alphas.jsonl').read_text().splitlines()]


def build(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def test_alphas_train_with_the_weights_and_are_recorded(searched):
    kind, it, work_dir, _ = searched
    lines = records(work_dir)
    assert [line['iter'] for line in lines] == ([0, 2, 4] if kind == 'seg' else [0, 1, 2])
    assert all(line['directions'] == list(DIRECTIONS) for line in lines)
    assert list(lines[0]['alphas']) == BLOCKS
    for block in BLOCKS:
        first, last = lines[0]['alphas'][block], lines[-1]['alphas'][block]
        assert all(a != b for a, b in zip(first, last, strict=True))
        assert max(map(abs, first)) < 0.01  # 1e-3 times normal
    state = torch.load(work_dir / it.last, weights_only=False)['state_dict']
    stored = [name for name in state if name.endswith('op.multi_scan.weights')]
    assert stored == [f'backbone.{block}.op.multi_scan.weights' for block in BLOCKS]
    for name, values in zip(stored, lines[-1]['alphas'].values(), strict=True):
        assert state[name].flatten().tolist() == values
    scalars = next(work_dir.glob('*/vis_data/scalars.json')).read_text()
    assert scalars.count('alpha/layers.3.blocks.0/w7_flip') == len(lines)


def test_log_and_picture(searched):
    kind, _, work_dir, path = searched
    log = next(work_dir.glob('*/*.log')).read_text()
    # at each checkpoint and at the end
    assert log.count('Shares of the scan directions in %') == (3 if kind == 'seg' else 2)
    assert ('of 4 blocks changed since the last table' in log) == (kind == 'seg')
    assert f'python tools/train.py {path} --data-root' in log
    assert ('model.backbone.pretrained of the config is left out' in log) == (kind == 'det')
    with Image.open(work_dir / 'directions.png') as picture:
        assert picture.mode == 'RGB' and picture.width > 600 and picture.height > 200
        assert len(picture.getcolors(1 << 20)) > 50


def test_config_has_the_largest_alphas_in_canonical_order(searched):
    kind, it, work_dir, path = searched
    alphas = records(work_dir)[-1]['alphas']
    model = build(path)
    for (block, values), names in zip(alphas.items(), model.backbone.directions, strict=True):
        assert set(names) == {DIRECTIONS[k] for k in torch.tensor(values).topk(4).indices}, block
        assert list(names) == sorted(names, key=DIRECTIONS.index)
    assert not any('multi_scan.weights' in name for name, _ in model.named_parameters())
    own = path.read_text().partition('model = ')[2]
    if kind == 'seg':
        assert own == 'dict(backbone=dict(directions=directions))\n'
    else:  # the command line changed the model
        assert Config.fromfile(path).model.test_cfg.rcnn.score_thr == 0.0
        assert Config.fromfile(path).model.backbone.pretrained is None
    before, after = Config.fromfile(it.config), Config.fromfile(path)
    assert set(after) == set(before) | {'directions'}
    for key in set(before) - {'model'}:
        assert after[key] == before[key], key


def test_config_trains(searched, tmp_path):
    kind, it, _, path = searched
    length = ['train_cfg.max_iters=1', 'val_cfg=None', 'val_dataloader=None',
              'val_evaluator=None'] if kind == 'seg' else ['train_dataloader.dataset.indices=2']
    run_train([str(path), *it.data_options, '--work-dir', str(tmp_path), *it.options, *length])
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'loss: nan' not in log and 'Saving checkpoint' in log


def test_choice_from_a_checkpoint(searched_once, tmp_path, capfd):
    _, it, work_dir, path = searched_once('seg')
    out = tmp_path / 'deep' / 'mine.py'
    capfd.readouterr()
    assert run(it, tmp_path / 'w', '--from', str(work_dir / it.last), '--out', str(out)) == str(out)
    assert Config.fromfile(out).directions == Config.fromfile(path).directions
    assert f'Config with the choice:  {out}' in capfd.readouterr().out
    assert (tmp_path / 'w' / 'directions.png').is_file()
    two = run(it, tmp_path / 'w', '--from', str(work_dir / it.last), '--pick', '2')
    alphas = records(work_dir)[-1]['alphas'].values()
    assert Config.fromfile(two).directions == [list(choose_directions(v, 2)) for v in alphas]


def test_resumed_search_is_bitwise(searched_once, tmp_path):
    _, it, whole, _ = searched_once('seg')
    # The interrupted run got further than its last checkpoint; its last line was cut off.
    shutil.copy(whole / it.first, tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / it.first))
    text = (whole / 'alphas.jsonl').read_text()
    (tmp_path / 'alphas.jsonl').write_text(text[:-20])
    run(it, tmp_path, '--resume')
    assert 'resumed epoch: 0, iter: 2' in next(tmp_path.glob('*/*.log')).read_text()
    assert (tmp_path / 'alphas.jsonl').read_text() == text
    left, right = (torch.load(folder / it.last, weights_only=False)['state_dict']
                   for folder in (whole, tmp_path))
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.slow
@pytest.mark.skipif(has_accelerator(), reason='runs on a CPU')
def test_two_processes_write_once(toy):
    it = toy('seg')
    done = subprocess.run(
        ['bash', str(ROOT / 'tools/dist_search.sh'), it.config, '2', *it.data_options,
         '--work-dir', 'w', '--interval', '1', *it.options, 'train_cfg.max_iters=2', 'val_cfg=None',
         'val_dataloader=None', 'val_evaluator=None'],
        env={**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line['iter'] for line in records(Path('w'))] == [0, 1, 2]
    assert (done.stdout + done.stderr).count('Config with the choice') == 1
    assert len(list(Path('w').glob('*_searched.py'))) == 1


# --- mistakes -------------------------------------------------------------------------------------

@pytest.fixture
def fails(capfd):
    def call(*argv):
        capfd.readouterr()
        assert run_command(search, [str(arg) for arg in argv]) == 1
        output = capfd.readouterr().err
        assert 'Traceback' not in output, output
        return output.partition('ERROR: ')[2]
    return call


def test_another_backbone(task, fails):
    text = fails(task('seg').config)
    assert 'is mmhybrid.MambaVision, whose scan directions cannot be searched' in text
    assert 'MM_LocalVSSM' in text and 'LocalVimClassifier' in text


def test_checkpoints_that_do_not_fit(toy, fails, tmp_path):
    it = toy('seg')
    torch.save(dict(state_dict=build(it.config).state_dict()), tmp_path / 'four.pth')
    text = fails(it.config, '--from', tmp_path / 'four.pth')
    assert 'four.pth holds no alphas' in text and 'multi_scan.weights' in text
    alphas = torch.zeros(8, 1, 1, 1)
    other = {f'backbone.layers.{i}.mixer.multi_scan.weights': alphas for i in range(3)}
    torch.save(dict(state_dict=other), tmp_path / 'vim.pth')
    text = fails(it.config, '--from', tmp_path / 'vim.pth')
    assert 'alphas for 3 blocks (layers.0, layers.1, layers.2)' in text
    assert 'has 4 (layers.0.blocks.0,' in text
    own = {f'backbone.{block}.op.multi_scan.weights': alphas / 0 for block in BLOCKS}
    torch.save(dict(state_dict=own), tmp_path / 'nan.pth')
    assert 'not finite' in fails(it.config, '--from', tmp_path / 'nan.pth')
    assert 'gone.pth does not exist' in fails(it.config, '--from', 'gone.pth')


@pytest.mark.parametrize('arguments, expected', [
    (['--pick', '9'], '1 to 8 directions, got pick=9'),
    (['--interval', '0'], '--interval must be at least 1'),
    (['--out', 'mine.txt'], '--out must end with .py'),
    (['--from', 'x.pth', '--resume'], '--resume is for training'),
    (['--from', 'x.pth', '--launcher', 'pytorch'], '--from needs one process'),
    (['--into', 'gone.py'], 'There is no config gone.py'),
    (['--cfg-options', 'model.backbone.frozen_stages=2'], 'model.backbone.frozen_stages=-1'),
    (['--cfg-options', 'model.backbone.arch.width=3'], "unknown key 'width'"),
])
def test_arguments(toy, fails, arguments, expected):
    assert expected in fails(toy('seg').config, *arguments)


def test_a_target_with_other_blocks(toy, fails, tmp_path):
    it = toy('seg')
    other = tmp_path / 'other.py'
    other.write_text(f'_base_ = {it.config!r}\n'
                     'model = dict(backbone=dict(arch=dict(depths=(1, 1, 2, 1))))\n')
    text = fails(it.config, '--into', other, '--data-root', it.data)
    assert 'has 4 (layers.0.blocks.0 to layers.3.blocks.0)' in text and 'has 5 (' in text


def test_directions_into_a_wider_network(toy, tmp_path):
    """Found in a narrow network, used in a wide one, as the paper does."""
    it = toy('seg')
    wide = tmp_path / 'wide.py'
    wide.write_text(
        f'_base_ = {it.config!r}\n'
        'model = dict(backbone=dict(arch=dict(dim=16)), auxiliary_head=dict(in_channels=64),\n'
        '             decode_head=dict(in_channels=[16, 32, 64, 128]))\n')
    values = {f'backbone.{block}.op.multi_scan.weights':
              torch.arange(8.).roll(k).view(8, 1, 1, 1) for k, block in enumerate(BLOCKS)}
    torch.save(dict(state_dict=values), tmp_path / 'found.pth')
    path = search([it.config, '--from', str(tmp_path / 'found.pth'), '--into', str(wide),
                   '--work-dir', str(tmp_path)])
    assert Path(path).name == 'wide_searched.py'
    backbone = build(path).backbone
    assert backbone.out_channels == (16, 32, 64, 128)
    assert backbone.directions[:2] == [('w2', 'w2_flip', 'w7', 'w7_flip'),
                                       ('h', 'w2_flip', 'w7', 'w7_flip')]
