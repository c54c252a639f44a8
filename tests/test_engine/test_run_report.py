"""Tables and pictures that a training leaves."""
import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
import small_runs
import torch

from mmhybrid.cli.actions.training import parse, run_training, training_parser
from mmhybrid.engine.run_report import hook as report
from mmhybrid.engine.run_report.scores import ClassScores, PixelWatcher, confusions
from mmhybrid.errors import UserError
from mmhybrid.visualization.training import draw_confusion, draw_curves

LABELS = {7: 0, 9: 1}


def thing(box, category=7, crowd=0):
    return dict(bbox=list(box), category_id=category, iscrowd=crowd)


def found(*rows):
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return dict(bboxes=np.array(boxes, np.float32).reshape(-1, 4), scores=np.array(scores),
                labels=np.array(labels, int))


@pytest.mark.parametrize('things, result, counts', [
    ([], found(), []),
    ([thing((0, 0, 10, 10))], found(((0, 0, 10, 10), 0.9, 0)), [(0, 0)]),
    ([thing((0, 0, 10, 10))], found(((0, 0, 10, 10), 0.9, 1)), [(0, 1)]),
    ([thing((0, 0, 10, 10), 9)], found(((0, 0, 10, 10), 0.2, 1)), [(1, 2)]),  # not sure
    ([thing((0, 0, 10, 10), 9)], found(((0, 0, 10, 4), 0.9, 1)), [(1, 2), (2, 1)]),
    ([thing((0, 0, 10, 10))], found(((0, 0, 10, 9), 0.9, 1), ((0, 0, 10, 10), 0.5, 0)),
     [(0, 0), (2, 1)]),  # the one that overlaps more belongs to the object
    ([thing((0, 0, 10, 10)), thing((20, 0, 10, 10), 9)],
     found(((20, 0, 30, 10), 0.9, 0), ((0, 0, 10, 10), 0.9, 1)), [(0, 1), (1, 0)]),
    ([thing((0, 0, 10, 10), 7, 1)], found(((0, 0, 5, 5), 0.9, 0)), []),  # in a crowd
    ([thing((0, 0, 10, 10), 7, 1)], found(((20, 20, 25, 25), 0.9, 0)), [(2, 0)]),
    ([thing((0, 0, 0, 0))], found(((0, 0, 0, 0), 0.9, 0)), [(0, 2), (2, 0)])])
def test_confusions(things, result, counts):
    expected = np.zeros((3, 3), int)
    for place in counts:
        expected[place] += 1
    assert (confusions(things, LABELS, result, 2) == expected).all()


def pixels(predicted, truth):
    return SimpleNamespace(pred_sem_seg=SimpleNamespace(data=torch.tensor([predicted])),
                           gt_sem_seg=SimpleNamespace(data=torch.tensor([truth])))


def test_pixels():
    watcher = PixelWatcher(SimpleNamespace(dataset_meta=dict(classes=('a', 'b', 'c')),
                                           ignore_index=255), True)
    watcher.add([pixels([[0, 1], [1, 1]], [[0, 0], [1, 255]])], 0, 2)
    watcher.add([pixels([[0, 1], [1, 1]], [[0, 0], [1, 255]])], 2, 2)  # one that is repeated
    scores = watcher.end()
    assert scores.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert scores.table[:2].tolist() == [[2, 0.5, 0.5], [1, 0.5, 1]]
    assert scores.table[2, 0] == 0 and np.isnan(scores.table[2, 1:]).all()
    watcher.begin()
    assert watcher.end().counts.sum() == 0


def test_images():
    watcher = PixelWatcher(SimpleNamespace(dataset_meta=dict(classes=('a', 'b'))), False)
    watcher.add([dict(gt_label=torch.tensor([1]), pred_label=0), dict(gt_label=0, pred_label=0)],
                0, 2)
    scores = watcher.end()
    assert scores.counts.tolist() == [[1, 0], [1, 0]]
    assert scores.heads == ['images', 'accuracy'] and scores.table.tolist() == [[1, 1], [1, 0]]


def class_scores(count):
    table = np.stack([np.arange(count) + 1., np.linspace(0, 1, count)], 1)
    table[0] = 0, np.nan
    names = [f'class {n}' for n in range(count)]
    counts = np.diag(np.arange(count) + 5)
    return ClassScores(['pixels', 'IoU'], table, names, counts, names, names, 'rule')


def test_the_table_in_the_log():
    lines = report.scores_table(class_scores(3)).splitlines()
    assert lines[2:] == ['| class 2             |      3 | 1.000 |',
                         '| class 1             |      2 | 0.500 |',
                         '| 1 not in the images |        |       |']
    lines = report.scores_table(class_scores(150)).splitlines()
    assert len(lines) == 34 and '... 119 more' in lines[17]
    assert 'class 149' in lines[2] and 'class 1 ' in lines[-2]
    assert '1 not in the images' in lines[-1]
    none = class_scores(2)
    none.table[:] = np.nan
    assert 'class 1' in report.scores_table(none)  # of no class anything is known


def is_drawn(picture):
    return min(picture.size) >= 300 and len(np.unique(np.asarray(picture))) > 20


@pytest.mark.parametrize('loss, metrics, per_epoch', [
    ([3.0, np.nan, np.inf, 1.0], dict(mAP=[(2, 0.1), (4, np.nan)]), 2),
    ([], {}, None),
    ([1.0], {'$a$_^': [(1, 1.0)]}, None),
    ([np.nan], {}, 1)])
def test_curves_of_odd_runs(loss, metrics, per_epoch):
    assert is_drawn(draw_curves(np.array(loss, float), np.full(len(loss), 1e-3),
                                max(1, len(loss)), metrics, per_epoch))


def test_confusions_of_odd_sets():
    assert is_drawn(draw_confusion(np.zeros((3, 3), int), ['a', 'b', 'background'],
                                   ['a', 'b', 'missed']))
    one = draw_confusion(np.array([[4, 1], [2, 0]]), ['ä' * 60, 'background'], ['ä' * 60, 'missed'])
    assert is_drawn(one)
    odd = ['$\\frac$', '_x', '', '猫']
    assert is_drawn(draw_confusion(np.eye(4, dtype=int), odd, odd, '5$ and $\\x$'))
    many = [str(n) for n in range(150)]
    assert max(draw_confusion(np.eye(150, dtype=int), many, many).size) < 2500


def train(tmp_path, *argv, **settings):
    args = [small_runs.write(tmp_path), '--work-dir', str(tmp_path / 'w'), *argv]
    with small_runs.quick(**settings):
        return run_training(parse(training_parser(''), args))


def validations(tmp_path):
    return json.loads((tmp_path / 'w/report/validations.json').read_text())


def test_a_run_and_a_resumed_one(tmp_path):
    train(tmp_path, pictures=True)
    whole = validations(tmp_path)
    assert [(each['epoch'], each['iter']) for each in whole] == [(1, 6), (2, 12), (3, 18)]
    assert set(whole[0]['metrics']) == {'toy/mean', 'toy/noise'}
    size = (tmp_path / 'w/report/curves.png').stat().st_size
    assert size > 5000
    runner = train(tmp_path, '--resume', str(tmp_path / 'w/epoch_2.pth'))
    assert validations(tmp_path)[:2] == whole[:2] and len(validations(tmp_path)) == 3
    assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 18
    (tmp_path / 'w/report/validations.json').write_text('[{"iter": 6}, 3')
    train(tmp_path, '--resume', str(tmp_path / 'w/epoch_2.pth'))
    assert [each['iter'] for each in validations(tmp_path)] == [18]


@pytest.mark.parametrize('argv', [
    ['--save-best', 'toy/men'],
    ['--cfg-options', 'default_hooks.checkpoint.save_best=toy/men',
     'default_hooks.checkpoint.rule=greater']])
def test_a_metric_that_no_validation_gives(argv, tmp_path):
    with pytest.raises(UserError, match=r'--save-best toy/men .* gives toy/mean, toy/noise'):
        train(tmp_path, *argv)
    assert (tmp_path / 'w/epoch_1.pth').exists()


def test_a_run_without_validation(tmp_path):
    runner = train(tmp_path, '--cfg-options', 'val_cfg=None', 'val_dataloader=None',
                   'val_evaluator=None')
    assert [path.name for path in (tmp_path / 'w/report').iterdir()] == ['curves.png']
    assert runner.train_loop.epoch == 3


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, 'No space left on device', path)

    monkeypatch.setattr(report, 'write_aside', full)
    runner = train(tmp_path)
    assert runner.train_loop.epoch == 3
    log = next((tmp_path / 'w').glob('*/*.log')).read_text()
    assert 'report/curves.png could not be written: No space left on device.' in log
    assert 'Training ended after epoch 3 of 3' in log
