"""Checks of data and classes before anything is built."""
import json

import pytest
from mmengine.config import Config
from PIL import Image

from mmhybrid.datasets.loading.checks import check_classes, check_data
from mmhybrid.errors import UserError


def config(folder, classes=('cat', 'dog'), names=('cat', 'dog'), **model):
    folder.mkdir(exist_ok=True)
    (folder / 'images').mkdir(exist_ok=True)
    (folder / 'images' / 'a.jpg').touch()
    (folder / 'a.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name='a.jpg', width=9, height=9)],
        annotations=[dict(id=1, image_id=1, category_id=0, bbox=[1, 1, 5, 5], area=25)],
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


def test_problems_name_file_and_split(tmp_path):
    cfg = config(tmp_path, names=('cat', 'horse'))
    with pytest.raises(UserError, match=r"a.json \(the train data\).*\n.*no category for 'dog'"):
        check_classes(cfg, ['train'])


def test_masks_are_needed_where_they_are_loaded(tmp_path):
    cfg = config(tmp_path)
    for each in cfg.train_dataloader.dataset.dataset.datasets:
        each.pipeline = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
    with pytest.raises(UserError, match='without a segmentation'):
        check_classes(cfg, ['train'])


def test_the_evaluator_reads_the_file_of_the_data(tmp_path):
    cfg = config(tmp_path)
    inner = cfg.train_dataloader.dataset.dataset.datasets[0]
    cfg.val_dataloader = dict(dataset=inner)
    cfg.val_evaluator = [dict(type='CocoMetric', ann_file=f'{tmp_path}//a.json')]
    assert check_classes(cfg, ['val']) == []
    (tmp_path / 'b.json').write_text((tmp_path / 'a.json').read_text().replace(
        '"images": [{"id": 1', '"images": [{"id": 2'))
    cfg.val_evaluator[0].ann_file = str(tmp_path / 'b.json')
    with pytest.raises(UserError, match='Set val_evaluator.0.ann_file'):
        check_classes(cfg, ['val'])


def test_label_images_are_checked(tmp_path):
    pytest.importorskip('mmseg')
    for name in ('images', 'labels'):
        (tmp_path / name).mkdir()
    Image.new('RGB', (8, 6)).save(tmp_path / 'images' / 'a.jpg')
    Image.new('L', (8, 6), 2).save(tmp_path / 'labels' / 'a.png')
    dataset = dict(
        type='BaseSegDataset', data_root=str(tmp_path), metainfo=dict(classes=('no', 'yes')),
        data_prefix=dict(img_path='images', seg_map_path='labels'))
    cfg = Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=dataset),
                      model=dict(decode_head=dict(num_classes=2))))
    with pytest.raises(UserError, match='has label 2, but with 2 classes'):
        check_classes(cfg, ['train'])
    cfg.train_dataloader.dataset.reduce_zero_label = True
    assert check_classes(cfg, ['train']) == []


def test_damaged_json(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / 'a.json').write_text('{"categories": [')
    with pytest.raises(UserError, match='a.json is not valid JSON: it ends early, in line 1'):
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


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(ann_file=3), 'ann_file of the train data is 3; expected one path'),
    (dict(ann_file=['a.json']), r"ann_file of the train data is \['a.json'\]; expected one path"),
    (dict(data_root=3), 'data_root of the train data is 3; expected one path'),
    (dict(data_prefix='images/'), "data_prefix of the train data is 'images/'; expected the fold"),
    (dict(data_prefix=dict(img=3)), "data_prefix of the train data is {'img': 3}; expected"),
    (dict(filter_cfg=3), 'filter_cfg of the train data is 3; expected a dictionary'),
    (dict(filter_cfg=dict(min_size='3')), "filter_cfg.min_size of the train data is '3'; expected"),
    (dict(indices='all'), "indices of the train data is 'all'; expected a number of images or"),
    (dict(indices=[0, 'a']), 'indices of the train data is .*; expected a number of images or'),
])
def test_settings_of_another_type(tmp_path, settings, message):
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset.dataset.datasets[1].update(settings)
    with pytest.raises(UserError, match=message):
        check_classes(cfg, ['train'])


@pytest.mark.parametrize('settings', [
    dict(indices=1), dict(indices=range(1)), dict(indices=[0]), dict(filter_cfg=None),
    dict(data_prefix=dict(img='images/', seg=None)), dict(metainfo=dict(classes=['cat', 'dog'])),
    dict(metainfo=('cat', 'dog')), dict(metainfo=dict(classes=3)),  # building them tells
])
def test_odd_settings_pass(tmp_path, settings):
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset.dataset.datasets[1].update(settings)
    assert check_classes(cfg, ['train']) == []


def test_data_sets_of_the_user_may_take_several_paths(tmp_path):
    for name in ('a.json', 'b.json', 'c/x'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    dataset = dict(type='Mine', data_root=str(tmp_path), ann_file=['a.json', 'b.json', None],
                   data_prefix=dict(img=['c'], scale=3))
    cfg = Config(dict(train_dataloader=dict(dataset=dataset), val_evaluator=[None]))
    check_data(cfg, ['train', 'val'])
    assert check_classes(cfg, ['train', 'val']) == []
    (tmp_path / 'b.json').unlink()
    with pytest.raises(UserError, match='b.json does not exist'):
        check_data(cfg, ['train'])


def test_metrics_given_as_classes_are_checked(tmp_path):
    from mmdet.evaluation import CocoMetric
    cfg = config(tmp_path)
    cfg.val_dataloader = cfg.train_dataloader
    cfg.val_evaluator = dict(type=CocoMetric, ann_file=str(tmp_path / 'a.json'), metric='segm')
    with pytest.raises(UserError, match='without a segmentation'):
        check_classes(cfg, ['val'])
