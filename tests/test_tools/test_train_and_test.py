"""tools/train.py and tools/test.py on real configs, heads, files and metrics."""
import csv
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train

OPENED = None


def record_files(event, args):
    if OPENED is not None and event == 'open' and isinstance(args[0], (str, bytes)):
        OPENED.append(args[0] if isinstance(args[0], str) else args[0].decode())


sys.addaudithook(record_files)


@pytest.fixture
def opened(monkeypatch):
    files = []
    monkeypatch.setitem(globals(), 'OPENED', files)
    return files


@pytest.fixture(scope='module', params=['det', 'seg'])
def trained(request, task, tmp_path_factory):
    """A short run of each task: (task, its work directory, the files it opened)."""
    global OPENED
    it = task(request.param)
    work_dir = tmp_path_factory.mktemp(request.param)
    OPENED, files = [], []
    try:
        # The folder comes through --cfg-options here and through --data-root below.
        run_train([it.config, '--work-dir', str(work_dir), *it.options, f'data_root={it.data}'])
        files = OPENED
    finally:
        OPENED = None
    return request.param, it, work_dir, files


def test_training_read_the_given_data_and_no_other(trained):
    kind, it, work_dir, files = trained
    data = [name for name in files
            if name.endswith(('.jpg', '.json')) or name.endswith('.png') and 'ADE' in name]
    inside = {name for name in data if name.startswith(it.data)}
    outside = {name for name in data if 'data/' in name} - inside
    assert not {name for name in outside if not name.startswith(str(work_dir))}
    expected = ['instances_train2017', 'instances_val2017', 'train2017/0', 'val2017/0'] \
        if kind == 'det' else ['images/training', 'annotations/training', 'images/validation',
                               'annotations/validation']
    for part in expected:
        assert any(part in name for name in inside), part


def test_resume_is_bitwise(trained, tmp_path):
    """Real pipelines with random flips and crops, drop path, both loops."""
    _, it, work_dir, _ = trained
    run_train([it.config, '--data-root', it.data, '--work-dir', str(tmp_path),
               '--resume', str(work_dir / it.first), *it.options])
    whole, resumed = (torch.load(folder / it.last, weights_only=False)
                      for folder in (work_dir, tmp_path))
    start = torch.load(work_dir / it.first, weights_only=False)
    moved = [name for name, value in whole['state_dict'].items()
             if value.is_floating_point() and not torch.equal(value, start['state_dict'][name])]
    assert len(moved) > 100
    for name, value in whole['state_dict'].items():
        assert torch.equal(value, resumed['state_dict'][name]), name
    for key, state in whole['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, resumed['optimizer']['state'][key][name]), (key, name)


def test_the_end_of_a_training(trained):
    """Scores of classes, confusions, curves, and where everything is."""
    kind, it, work_dir, _ = trained
    report = work_dir / 'report'
    assert sorted(path.name for path in report.iterdir()) == [
        'classes.csv', 'confusion.csv', 'confusion.png', 'curves.png', 'validations.json']
    validation, = json.loads((report / 'validations.json').read_text())
    metrics = validation['metrics']
    with open(report / 'classes.csv', newline='') as file:
        heads, *rows = csv.reader(file)
    assert heads == ['class', *(['objects', 'box AP', 'box AP50', 'mask AP', 'mask AP50']
                                if kind == 'det' else ['pixels', 'IoU', 'accuracy'])]
    scores = np.array([row[1:] for row in rows], float)
    with open(report / 'confusion.csv', newline='') as file:
        (_, *columns), *lines = csv.reader(file)
    counts = np.array([line[1:] for line in lines], int)
    occurs = scores[:, 0] > 0
    if kind == 'det':
        for column, key in ((1, 'coco/bbox_mAP'), (3, 'coco/segm_mAP')):
            assert np.nanmean(scores[:, column]) == pytest.approx(metrics[key], abs=6e-4)
        assert (columns[-1], lines[-1][0]) == ('missed', 'background')
        assert (counts[:-1].sum(1) == scores[:, 0]).all()
    else:
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        assert np.nanmean(scores[:, 1]) == pytest.approx(metrics['mIoU'] / 100, abs=6e-5)
        assert np.nanmean(scores[occurs, 1]) == pytest.approx(
            metrics['mIoU_present'] / 100, abs=6e-5)
        assert np.allclose(scores[occurs, 1], (counts.diagonal() / np.maximum(union, 1))[occurs],
                           atol=1e-5)
    for name in ('curves.png', 'confusion.png'):
        picture = Image.open(report / name)
        assert min(picture.size) >= 400 and len(np.unique(np.asarray(picture))) > 20
    log = next(work_dir.glob('*/*.log')).read_text()
    end = log[log.index('Training ended after '):]
    for part in (it.last, 'report/curves.png', 'report/classes.csv', 'report/confusion.png',
                 f'mmhybrid predict PICTURES --weights {work_dir}',
                 f'mmhybrid test {it.config} {work_dir / it.last}'):
        assert part in end
    assert 'Classes in the last validation' in log


def test_checkpoints_load_safely(trained):
    """Nothing of ours needs unpickling of arbitrary objects (torch >= 2.6 refuses it)."""
    _, it, work_dir, _ = trained
    states = torch.load(work_dir / it.last, weights_only=False)['random_state']
    torch.save(states, work_dir / 'states.pth')
    loaded = torch.load(work_dir / 'states.pth', weights_only=True)
    assert loaded['ranks'][0]['numpy'][0] == 'MT19937'


def test_out_and_pictures(trained, tmp_path, capfd):
    kind, it, work_dir, _ = trained
    metrics = run_test([it.config, str(work_dir / it.last), '--data-root', it.data,
                        '--work-dir', str(tmp_path / 'w'), '--out', 'p/results.pkl',
                        '--show-dir', 'pictures', *it.options])
    key, head = ('coco/segm_mAP', '| mask |') if kind == 'det' else ('mIoU', ' aAcc |')
    assert metrics[key] >= 0
    with open('p/results.pkl', 'rb') as file:
        results = pickle.load(file)
    assert len(results) == 3
    names = {Path(result['img_path']).name for result in results}
    assert names == {path.name for path in Path(it.data).glob('**/*val*/*.jpg')}
    if kind == 'det':
        assert len(results[0]['pred_instances']['masks']) == 5
    else:
        assert 'seg_logits' not in results[0]
    pictures = list(Path('pictures').rglob('*.jpg' if kind == 'det' else '*.png'))
    assert len(pictures) == 3
    log = next((tmp_path / 'w').glob('*/*.log')).read_text()
    assert head in log
    assert 'Pictures of the predictions go to ' + str(
        pictures[0].parent.resolve() if kind == 'seg' else Path('pictures').resolve()) in log


def test_tta(trained, tmp_path):
    kind, it, work_dir, _ = trained
    config = it.config
    if kind == 'seg':
        config = tmp_path / 'two_scales.py'
        config.write_text(f"""_base_ = {it.config!r}
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in (0.5, 1.0)],
        [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
        [dict(type='LoadAnnotations', reduce_zero_label=True)],
        [dict(type='PackSegInputs')]])]
""")
    metrics = run_test([str(config), str(work_dir / it.last), '--data-root', it.data, '--tta',
                        '--work-dir', str(tmp_path / 'w'), *it.options])
    log = next((tmp_path / 'w').glob('*/*.log')).read_text()
    if kind == 'det':
        assert 'coco/bbox_mAP' in metrics and 'coco/segm_mAP' not in metrics
        assert 'merges boxes only' in log
    else:
        assert 'mIoU' in metrics


def test_amp_and_scaled_learning_rate(task, tmp_path):
    it = task('seg')
    run_train([it.config, '--data-root', it.data, '--work-dir', str(tmp_path), '--amp',
               '--auto-scale-lr', *it.options, 'train_cfg.max_iters=1',
               'auto_scale_lr.base_batch_size=8'])
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Scaling the original LR by 0.25' in log
    assert 'Mixed precision (float16)' in log or torch.cuda.is_available()
    assert 'denormal' in log or torch.cuda.is_available()
    assert 'random weights' in log
