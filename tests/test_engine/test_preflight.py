"""Checks of data and classes before anything is built."""
import json

import pytest
from mmengine.config import Config

from mmhybrid.engine.errors import UserError
from mmhybrid.engine.preflight import check_classes, check_data


def config(folder, classes=('cat', 'dog'), names=('cat', 'dog'), **model):
    folder.mkdir(exist_ok=True)
    (folder / 'images').mkdir(exist_ok=True)
    (folder / 'images' / 'a.jpg').touch()
    (folder / 'a.json').write_text(json.dumps(dict(
        categories=[dict(id=i, name=name) for i, name in enumerate(names)])))
    inner = dict(type='CocoDataset', data_root=str(folder), ann_file='a.json',
                 data_prefix=dict(img='images/'), metainfo=dict(classes=classes))
    return Config(dict(
        default_scope='mmdet', data_root=str(folder),
        model=model or dict(bbox_head=[dict(num_classes=2)]),
        train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(
            type='ConcatDataset', datasets=[inner, dict(inner)])))))


def test_all_is_well(tmp_path):
    cfg = config(tmp_path)
    check_data(cfg, ['train'])
    assert check_classes(cfg, ['train']) == []


def test_nested_data_sets_are_checked(tmp_path):
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset.dataset.datasets[1].ann_file = 'b.json'
    with pytest.raises(UserError, match='train: .*b.json does not exist'):
        check_data(cfg, ['train'])


def test_servers_are_not_looked_for(tmp_path):
    cfg = config(tmp_path)
    for each in cfg.train_dataloader.dataset.dataset.datasets:
        each.data_root = 's3://bucket/'
    check_data(cfg, ['train'])


def test_classes_without_category_are_told(tmp_path):
    cfg = config(tmp_path, names=('cat', 'horse'))
    note, = check_classes(cfg, ['train'])  # once, though two data sets share the file
    assert 'no category for dog' in note and 'shifted' in note


def test_damaged_json(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / 'a.json').write_text('{"categories": [')
    with pytest.raises(UserError, match='a.json is no valid JSON'):
        check_classes(cfg, ['train'])


def test_heads_that_count_for_themselves(tmp_path):
    cfg = config(tmp_path, rpn_head=dict(num_classes=1), semantic_head=dict(num_classes=183),
                 bbox_head=dict(num_classes=2))
    assert check_classes(cfg, ['train']) == []
    cfg.model.bbox_head.num_classes = 80
    with pytest.raises(UserError, match='model.bbox_head.num_classes=2 '):
        check_classes(cfg, ['train'])


def test_classes_from_a_file(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / 'names.txt').write_text('cat\ndog\n')
    for each in cfg.train_dataloader.dataset.dataset.datasets:
        each.metainfo.classes = str(tmp_path / 'names.txt')
    assert check_classes(cfg, ['train']) == []
    each.metainfo.classes = str(tmp_path / 'gone.txt')
    with pytest.raises(UserError, match='gone.txt, which does not exist'):
        check_classes(cfg, ['train'])
