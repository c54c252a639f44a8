"""Annotation files as other programs write them, through the tools."""
import json

import pytest
from mmengine.runner import Runner

from mmhybrid import cli
from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.training import train as run_train


@pytest.fixture
def rewritten(task, tmp_path):
    """A copy of the set, with a function that changes and rewrites one of its files."""
    it = task('det', copy=tmp_path / 'data/coco')

    def rewrite(split, change, encoding='utf-8'):
        path = tmp_path / f'data/coco/annotations/instances_{split}2017.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content), encoding=encoding)
        return path
    return it, rewrite


def test_without_iscrowd_and_with_a_byte_order_mark(rewritten, tmp_path):
    """Both train and are scored; mmdet alone stops at the one, and after an epoch at the other."""
    it, rewrite = rewritten
    for split in ('train', 'val'):
        rewrite(split, lambda content: [entry.pop('iscrowd') for entry in content['annotations']],
                'utf-8-sig')
    run_train([it.config, '--work-dir', str(tmp_path / 'work'), '--data-root', it.data,
               *it.options, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1'])
    (log,) = (tmp_path / 'work').glob('*/*.log')
    text = log.read_text()
    assert 'coco/bbox_mAP' in text and 'coco/segm_mAP' in text
    assert text.count('(the train data): 6 of 6 images and ') == 1
    assert text.count('(the val data): 3 of 3 images and ') == 1
    assert text.count('without iscrowd count as 0') == 2


def test_every_tool_says_the_same(rewritten, tmp_path, capsys, monkeypatch):
    it, rewrite = rewritten
    rewrite('val', lambda content: content['annotations'][0].update(area='12'))
    sentence = '"area" is not a number of pixels (1 of '
    monkeypatch.setattr(Runner, 'from_cfg', None)
    argv = [it.config, '--data-root', it.data]
    assert run_command(run_train, argv) == 1
    error = capsys.readouterr().err
    assert sentence in error and 'Traceback' not in error
    assert cli.main(['visualize', it.config, 'none.pth', *argv[1:]]) == 1
    error = capsys.readouterr().err
    assert sentence in error and 'Traceback' not in error
    assert cli.main(['data', 'coco', '--root', str(tmp_path / 'data')]) == 1
    assert sentence in capsys.readouterr().out
