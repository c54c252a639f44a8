"""Annotation files as people have them: every fault is named, and every honest oddity passes."""
import contextlib
import gzip
import io
import json
import os
import random
import stat
import zipfile

import numpy as np
import pytest
from coco_cases import config, good, outcome, use
from PIL import Image

from mmhybrid.datasets import coco_file, coco_records
from mmhybrid.datasets.coco_file import AnnotationError, read_coco
from mmhybrid.datasets.loading.checks import check_classes
from mmhybrid.errors import UserError

NAN, INF = float('nan'), float('inf')


@pytest.fixture(scope='module', autouse=True)
def scope():
    pytest.importorskip('mmdet')
    from mmengine.registry import init_default_scope
    init_default_scope('mmdet')


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2):
        Image.new('RGB', (120, 100)).save(tmp_path / f'{number}.jpg')
    return tmp_path


def write(folder, content, name='a.json', **options):
    (folder / name).write_text(json.dumps(content, **options))


def changed(change):
    content = good()
    change(content, content['images'], content['annotations'])
    return content


def refused(folder, splits=('train', 'val'), cfg=None):
    with pytest.raises(UserError) as caught:
        check_classes(config(folder) if cfg is None else cfg, splits)
    text = str(caught.value)
    assert str(folder / 'a.json') in text
    return text


def set_(place, **values):
    return lambda d, i, a: a[place].update(values)


def polygons(*parts):
    return set_(0, segmentation=[list(part) for part in parts])


SQUARE = [10, 10, 60, 10, 60, 50, 10, 50]


# Values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('change, sentence', [
    (polygons(SQUARE[:4]), 'id 1 has a polygon of 4 numbers (it takes an even number of them, six'),
    (polygons(SQUARE[:7]), 'id 1 has a polygon of 7 numbers'),
    (polygons([]), 'id 1 has a polygon of 0 numbers'),
    (polygons([SQUARE]), 'id 1 has a polygon of lists; expected the numbers themselves'),
    (polygons(*[[x, y] for x, y in zip(SQUARE[::2], SQUARE[1::2], strict=True)]),
     'id 1 has a polygon of 2 numbers'),
    (set_(0, segmentation=SQUARE), 'id 1 has 10 in place of a polygon'),
    (set_(0, segmentation='x'), 'id 1 has "x" in place of polygons or run lengths'),
    (set_(0, segmentation=[]), '(id 1) without a segmentation'),
    (set_(0, segmentation=None), '(id 1) without a segmentation'),
    (set_(0, segmentation={}), '(id 1) without a segmentation'),
    (polygons(['1', '2', '3', '4', '5', '6']), 'id 1 has a polygon with "1" in place of a number'),
    (polygons(SQUARE, [None, *SQUARE]), 'id 1 has a polygon with null in place of a number'),
    (polygons([NAN, *SQUARE[1:]]), 'id 1 has a polygon with the coordinate NaN'),
    (polygons([*SQUARE[1:], -INF]), 'id 1 has a polygon with the coordinate -Infinity'),
    (polygons([1e30, *SQUARE[1:]]), 'id 1 has a polygon with the coordinate 1e+30'),
    (polygons([10**400, *SQUARE[1:]]), 'coordinate a whole number of more than 40 digits'),
    (set_(2, segmentation=dict(size=[100, 120])), 'id 3 has an object with ["size"]; run lengths'),
    (set_(2, segmentation=dict(size=[120, 100], counts='bo0n0V20Va:')),
     'id 3 has run lengths of size [120, 100], but its image has [height, width] [100, 120]'),
    (set_(2, segmentation=dict(size=[100, 120], counts='bo0n0V20Va')),
     'id 3 has run lengths with "bo0n0V20Va" in place of compressed "counts"'),
    (set_(2, segmentation=dict(size=[100, 120], counts='bo0n0V20')),
     'id 3 has run lengths of 1140 pixels together; its size has 12000'),
    (set_(2, segmentation=dict(size=[100, 120], counts='bo0n0V20Vä:')),
     'id 3 has run lengths with "bo0n0V20Vä:" in place of compressed "counts"'),
    (set_(2, segmentation=dict(size=[100, 120], counts='bo0n0V20V !')),
     'id 3 has run lengths with "bo0n0V20V !" in place of compressed "counts"'),
    (set_(2, segmentation=dict(size=[100, 120], counts='')), 'id 3 has run lengths with ""'),
    (set_(2, segmentation=dict(size=[100, 120], counts='ooooooooooooooo0')),
     'id 3 has run lengths with "ooooooooooooooo0" in place of compressed "counts"'),
    (set_(1, segmentation=dict(size=[100, 120], counts=[3, 4])),
     'id 2 has run lengths of 7 pixels together; its size has 12000'),
    (set_(1, segmentation=dict(size=[100, 120], counts=[-3, 12003])), 'that is not a length'),
    (set_(1, segmentation=dict(size=[100, 120], counts=[12000.5])), 'that is not a length'),
    (set_(1, segmentation=dict(size=[100, 120], counts=['12000'])), 'expected numbers or text'),
    (set_(1, segmentation=dict(size=[1e9, 1e9], counts=[10**18])), '"size" is [1000000000.0, 1000'),
    (set_(0, bbox=[1, 1, INF, 5]), '"bbox" is not four numbers [x, y, width, height] in pixels '
                                   '(1 of 4): id 1 has [1, 1, Infinity, 5]'),
    (set_(0, bbox=['1', '1', '5', '5']), 'id 1 has ["1", "1", "5", "5"]'),
    (set_(0, bbox=dict(x=1)), 'id 1 has {"x": 1}'),
    (set_(0, bbox=None), 'id 1 has null'),
    (set_(0, area=NAN), '"area" is not a number of pixels (1 of 4): id 1 has NaN'),
    (set_(0, area='12'), '"area" is not a number of pixels (1 of 4): id 1 has "12"'),
    (set_(0, area=[1]), 'id 1 has [1]'),
    (set_(0, iscrowd='0'), '"iscrowd" is not 0 or 1 (1 of 4): id 1 has "0"'),
    (set_(0, iscrowd='false'), '"iscrowd" is not 0 or 1'),
    (set_(0, ignore='0'), '"ignore" is not 0 or 1 (1 of 4): id 1 has "0"'),
    (set_(0, iscrowd=2), '"iscrowd" is not 0 or 1'),
    (set_(0, id=[1]), '"id" is not a number or a text that identifies it (1 of 4): annotations[0] '
                      'has [1]'),
    (set_(0, id=None), 'annotations[0] has null'),
    (set_(0, id=True), 'annotations[0] has true'),
    (set_(0, id=1.5), 'annotations[0] has 1.5'),
    (set_(0, id='a1'), '1 annotation (id "a1") whose id is text'),
    (set_(0, id=2), 'annotation id 2 2 times'),
    (set_(0, image_id={}), '"image_id" is not the id of an image (1 of 4): id 1 has {}'),
    (set_(0, category_id=None),
     '"category_id" is not the id of a category (1 of 4): id 1 has null'),
    (set_(0, category_id=10**30), 'id 1 has 1000000000000000000000000000000'),
    (lambda d, i, a: a[0].pop('category_id'), 'without "category_id" (1 of 4: id 1)'),
    (lambda d, i, a: a.append(None), '1 of 5 annotations that are not objects {"id": ...}: '
                                     'annotations[4] is null'),
    (lambda d, i, a: i.insert(0, []), '1 of 3 images that are not objects {"id": ...}: images[0]'),
    (lambda d, i, a: i[1].update(width='120'), '"width" is not a whole number of pixels (1 of 2): '
                                               'id 2 has "120"'),
    (lambda d, i, a: i[1].update(height=0), 'id 2 has 0'),
    (lambda d, i, a: i[1].update(height=99.5), 'id 2 has 99.5'),
    (lambda d, i, a: i[1].update(width=True), 'id 2 has true'),
    (lambda d, i, a: i[1].update(file_name=None), '"file_name" is not the name of a file (1 of 2): '
                                                  'id 2 has null'),
    (lambda d, i, a: i[1].update(file_name=''), 'id 2 has ""'),
    (lambda d, i, a: i[1].update(file_name='a\0.jpg'), 'id 2 has "a\\u0000.jpg"'),
    (lambda d, i, a: i[1].update(file_name='\udc80.jpg'), 'id 2 has "\\udc80.jpg"'),
    (lambda d, i, a: i[1].update(file_name='3.jpg'), '3.jpg (image id 2). Compare data_prefix'),
    (lambda d, i, a: i[1].update(file_name='.'), '(image id 2). Compare data_prefix'),
    (lambda d, i, a: i[1].update(id=1), 'image id 1 2 times'),
    (lambda d, i, a: i[1].update(id=[2]), 'images[1] has [2]'),
    (lambda d, i, a: d['categories'][1].update(id=4), 'category id 4 2 times'),
    (lambda d, i, a: d['categories'][1].update(name=None), '"name" is not a text (1 of 2): id 9 '
                                                           'has null'),
    (lambda d, i, a: d['categories'].append(dict(id=5, name='cat')), "more than one category named "
                                                                     "'cat'"),
    (lambda d, i, a: d['categories'].reverse(), 'categories in another order'),
    (lambda d, i, a: d.update(categories=None), '"categories" is null; expected a list'),
    (lambda d, i, a: d.update(categories={'4': 'cat'}), '"categories" is {"4": "cat"}; expected'),
    (lambda d, i, a: d.update(categories=[]), 'none of the 2 classes'),
    (lambda d, i, a: d.update(images={}), '"images" is {}; expected a list'),
    (lambda d, i, a: d.pop('images'), '"images" is missing; expected a list (the file has info,'),
    (lambda d, i, a: d.update(annotations=None), '"annotations" is null; expected a list'),
    (lambda d, i, a: [image.update(id=str(image['id'])) for image in i],
     'ids of images that are numbers in one place ("image_id": 1 in annotations, id 1) and text in '
     'another ("id": "1" in images), which never match'),
    (set_(0, category_id='4'),
     'ids of categories that are numbers in one place ("category_id": 9 in annotations, id 2) and '
     'text in another ("category_id": "4" in annotations, id 1)'),
])
def test_faults_are_named(folder, change, sentence):
    write(folder, changed(change))
    text = refused(folder)
    assert sentence in text, text
    assert text.count(sentence) == 1 and 'Error' not in text


def deep(node, levels):
    for _ in range(levels):
        node = [node]
    return node


@pytest.mark.parametrize('change', [
    lambda d, i, a: d.update(info=None, licenses='x', extra=[None, dict(a=deep(1, 50))]),
    lambda d, i, a: [entry.pop('iscrowd') for entry in a],
    lambda d, i, a: [entry.update(iscrowd=bool(entry['iscrowd'])) for entry in a],
    lambda d, i, a: [entry.update(iscrowd=entry['iscrowd'] or None, ignore=None) for entry in a],
    lambda d, i, a: [entry.update(image_id=float(entry['image_id']), area=7) for entry in a],
    lambda d, i, a: i[0].update(width=120.0, height=100.0),
    lambda d, i, a: [each.update({key: str(each[key])}) for each, key in (
        *((image, 'id') for image in i), *((entry, 'image_id') for entry in a))],
    lambda d, i, a: [each.update({key: str(each[key])}) for each, key in (
        *((kind, 'id') for kind in d['categories']), *((entry, 'category_id') for entry in a))],
    lambda d, i, a: [entry.update(id=entry['id'] + 900_000_000_000) for entry in a],
    lambda d, i, a: (d['categories'][0].update(id=0), a[0].update(category_id=0)),
    lambda d, i, a: (i[0].update(id=0), [entry.update(image_id=0) for entry in a[:2]]),
    lambda d, i, a: d['categories'].insert(1, dict(id=1, name='horse')),
    lambda d, i, a: a.append(dict(a[0], id=7, image_id=77)),
    lambda d, i, a: a.append(dict(a[0], id=7, category_id=77)),
    lambda d, i, a: a.append(dict(a[0], id=7, bbox=[5, 5, 0, 0])),
    lambda d, i, a: a.append(dict(a[0], id=7, bbox=[500, 5, 9, 9], area=0)),
    lambda d, i, a: a.append(dict(a[0], id=7, bbox=[-5.5, -5, 9, 9], area=-3)),
    polygons([-30.5, 10, 300.25, 10, 60, 5000]),
    polygons(SQUARE * 4000),
    lambda d, i, a: a.clear() or a.append(dict(good()['annotations'][0], keypoints=[1, 2, 2],
                                               num_keypoints=1, attributes={'occluded': False})),
    set_(1, segmentation=dict(size=[100, 120], counts=[0, 12000])),
    set_(1, segmentation=dict(size=[100.0, 120], counts=[5.0, 0, 11995])),
])
def test_honest_oddities_pass(folder, change):
    write(folder, changed(change))
    assert outcome(folder) == 'used'


def test_random_run_lengths_are_read_as_pycocotools_wrote_them():
    from pycocotools import mask as coder
    rng = np.random.default_rng(0)
    coded = []
    for place in range(200):
        size = rng.integers(1, 70, 2)
        mask = rng.random(size) < rng.choice((0, 0.02, 0.5, 0.98, 1))
        text = coder.encode(np.asfortranarray(mask.astype(np.uint8)))['counts'].decode()
        coded.append((place, text, int(size.prod())))
    mask = np.zeros((3000, 4000), np.uint8, order='F')
    mask[-1, -1] = mask[7, 5] = 1
    coded.append((200, coder.encode(mask)['counts'].decode(), mask.size))
    assert coco_records._compressed_faults(coded) == {}
    other = [(place, text, pixels + 1) for place, text, pixels in coded]
    assert len(coco_records._compressed_faults(other)) == len(coded)


def test_good_and_bad_polygons_in_one_object(folder):
    """Training leaves the bad ones out and says so; the metric cannot read them."""
    write(folder, changed(polygons(SQUARE, SQUARE[:4])))
    (note,) = check_classes(config(folder), ['train'])
    assert note == (f'{folder / "a.json"}: 1 annotation (id 1) with good polygons and with others '
                    'that have fewer than six or an odd number of coordinates: the others are left '
                    'out of the mask.')
    assert 'id 1 has a polygon of 4 numbers' in refused(folder, ['val'])


def test_boxes_alone_need_no_good_masks(folder):
    write(folder, changed(polygons([NAN])))
    cfg = config(folder)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.pipeline[1].with_mask = False
    cfg.val_evaluator.metric = 'bbox'
    assert check_classes(cfg, ['train', 'val']) == []
    cfg.val_evaluator.metric = ['bbox', 'segm']
    assert 'coordinate NaN' in refused(folder, ['val'], cfg)


def test_run_lengths_where_polygons_are_loaded(folder):
    """With poly2mask=False mmdet learns nothing from run lengths; those of crowds do not matter."""
    write(folder, good())
    cfg = config(folder)
    assert check_classes(cfg, ['train']) == []
    cfg.train_dataloader.dataset.pipeline[1].poly2mask = False
    (note,) = check_classes(cfg, ['train'])
    assert ('1 annotation (id 3) with run lengths, but the pipeline loads polygons '
            '(poly2mask=False): nothing is learned from them') in note
    write(folder, changed(lambda d, i, a: a.pop(0)))
    assert '(id 3) with run lengths, but' in refused(folder, ['train'], cfg)


# Objects ----------------------------------------------------------------------------------------
def test_only_crowds(folder):
    write(folder, changed(lambda d, i, a: [entry.update(iscrowd=1) for entry in a]))
    text = refused(folder)
    assert ('has no annotation that can be used for training: 3 annotations (id 1, 2, 3) marked '
            '"iscrowd": 1; 1 annotation (id 4) marked "ignore"') in text
    assert 'CVAT' in text and 'Set "iscrowd": 0 where it is one object' in text
    (note,) = check_classes(config(folder), ['val'])
    assert 'has no object of these classes that could be found, so all scores would be -1' in note


def test_an_image_that_holds_only_crowds_is_a_line(folder):
    write(folder, changed(set_(2, iscrowd=1)))
    infos = []
    assert check_classes(config(folder), ['train'], infos) == []
    assert infos == [
        f'{folder / "a.json"} (the train data): 2 of 2 images and 3 of 4 annotations are used; '
        'left out: 1 annotation marked "ignore"; 2 of the annotations are crowds, of which nothing '
        'is learned; 1 image holds only crowds.']


def test_filters_that_leave_nothing(folder):
    write(folder, good())
    cfg = config(folder)
    cfg.train_dataloader.dataset.filter_cfg = dict(min_size=101)
    assert '2 images smaller than filter_cfg.min_size=101' in refused(folder, ['train'], cfg)
    cfg.train_dataloader.dataset.filter_cfg = dict(min_size='32')
    with pytest.raises(UserError, match="filter_cfg.min_size of the train data is '32'"):
        check_classes(cfg, ['train'])


def test_areas_of_zero_leave_nothing(folder):
    write(folder, changed(lambda d, i, a: [entry.update(area=0) for entry in a]))
    assert '3 annotations (id 1, 2, 3) whose area is not above 0' in refused(folder)


def test_a_name_listed_twice_and_the_id_zero_are_warned_of(folder):
    write(folder, changed(lambda d, i, a: (i[1].update(file_name='1.jpg'), a[0].update(id=0))))
    zero, twice = check_classes(config(folder), ['val'])
    assert "1 file name is listed more than once: '1.jpg', for example, by 2 images (id 1, 2)" in \
        twice
    assert 'the annotation with id 0 can never be found' in zero


def sizes_and_objects(dataset):
    samples = [dataset.get_data_info(index) for index in range(len(dataset))]
    return len(samples), sum(len(sample['instances']) for sample in samples)


def odd_content(rng):
    """Every reason to leave something out, at random."""
    images = [dict(id=number, file_name=f'{number}.jpg', width=rng.choice((20, 40)),
                   height=rng.choice((30, 50))) for number in range(1, rng.randint(3, 9))]
    annotations = [dict(id=number, image_id=rng.randint(1, 9), category_id=rng.choice((4, 9, 5, 6)),
                        bbox=[rng.choice((-9, 1, 39.5)), 1, rng.choice((0.5, 1, 8.5)), 9],
                        area=rng.choice((0, 5, 5)), iscrowd=rng.choice((0, 0, 1)),
                        ignore=rng.choice((0, 0, 0, 1))) for number in range(1, 30)]
    for image in (images[0], images[-1]):
        annotations.append(dict(annotations[0], id=90 + image['id'], image_id=image['id'], area=9,
                                category_id=4, bbox=[1, 1, 9, 9], ignore=0, iscrowd=0))
    return dict(images=images, annotations=annotations, categories=[
        dict(id=5, name='horse'), dict(id=4, name='cat'), dict(id=9, name='dog')])


@pytest.mark.parametrize('options', [
    {}, dict(filter_cfg=dict(filter_empty_gt=True)), dict(filter_cfg=dict(min_size=32)),
    dict(filter_cfg=dict(filter_empty_gt=True, min_size=30)), dict(indices=2), dict(indices=-2),
    dict(indices=[0, 0, -1], filter_cfg=dict(filter_empty_gt=True)),
    dict(test_mode=True, filter_cfg=dict(filter_empty_gt=True, min_size=999)),
], ids=str)
@pytest.mark.parametrize('wrapped', [False, True])
def test_the_summary_counts_what_mmdet_uses(folder, options, wrapped):
    from mmdet.registry import DATASETS
    for seed in range(8):
        content = odd_content(random.Random(seed))
        for image in (content['images'][0], content['images'][-1]):
            image.update(width=200, height=200)
        for image in content['images']:
            (folder / image['file_name']).touch()
        write(folder, content)
        cfg = config(folder)
        cfg.train_dataloader.dataset.pop('pipeline')
        cfg.train_dataloader.dataset.update(options)
        inner = cfg.train_dataloader.dataset
        if wrapped:
            cfg.train_dataloader.dataset = dict(
                type='ClassBalancedDataset', oversample_thr=0.1,
                dataset=dict(type='RepeatDataset', times=2, dataset=inner))
        infos = []
        check_classes(cfg, ['train'], infos)
        (line,) = infos
        with contextlib.redirect_stdout(io.StringIO()):
            images, objects = sizes_and_objects(DATASETS.build(inner))
        assert (f'{images} of {len(content["images"])} images and {objects} of 31 annotations are '
                'used') in line, (seed, line)
        left_out = line.partition('left out: ')[2].partition(';')[0].split(', ')
        numbers = [int(part.split()[0]) for part in left_out if ' annotation' in part
                   and ' image' not in part.partition('annotation')[0]]
        if not isinstance(options.get('indices'), list):
            assert sum(numbers) == 31 - objects, (seed, line)


def test_a_filter_of_ones_own_is_not_counted(folder):
    from mmdet.datasets import CocoDataset

    class Choosy(CocoDataset):
        def filter_data(self):
            return self.data_list[:1]

    write(folder, good())
    cfg = config(folder)
    cfg.train_dataloader.dataset.update(type=Choosy, filter_cfg=dict(min_size='own'))
    infos = []
    assert check_classes(cfg, ['train'], infos) == []
    assert '2 of 2 images' in infos[0] and 'filters them in a way of its own' in infos[0]


def test_data_sets_of_other_forms_are_left_alone(folder):
    (folder / 'a.json').write_text('{"images": 3, "data_list": []}')
    for kind in ('LVISV1Dataset', 'CocoPanopticDataset', 'BaseDetDataset', 'XMLDataset',
                 'Objects365V1Dataset'):
        cfg = config(folder)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.type = kind
        assert check_classes(cfg, ['train', 'val']) == []


# Files ------------------------------------------------------------------------------------------
def zipped(data):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, 'w') as archive:
            archive.writestr('a.json', data)
        return file.getvalue()


GOOD = json.dumps(good())
VIA = {'1.jpg5': dict(filename='1.jpg', size=5, regions=[], file_attributes={})}


@pytest.mark.parametrize('data, sentence', [
    ('', 'is empty: writing or fetching it was not finished'),
    (' \n', 'holds nothing but blanks'),
    (b'\0' * 999, 'holds nothing but blanks or zero bytes (999 bytes)'),
    (GOOD[:700], 'is not valid JSON: it ends early, in line 1, column 701'),
    (json.dumps(good(), indent=1)[:700], 'it ends early, in line 64, column 8'),
    (GOOD.replace('"images"', '"images'), 'is not valid JSON: Expecting'),
    (GOOD.replace('[10, 10', '[10,, 10', 1), "near '"),
    (GOOD + GOOD, 'it goes on after its end'),
    (json.dumps({'id': 1}) + '\n' + json.dumps({'id': 2}), 'JSON Lines'),
    ('path: data\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n', "YOLO's data.yaml"),
    ('# mine\nnc: 2\nnames:\n  0: cat\n', "YOLO's data.yaml"),
    ('0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.2 0.2\n', 'a label file of YOLO'),
    ('<annotation><folder>a</folder></annotation>', 'an XML file of Pascal VOC'),
    ('<?xml version="1.0"?>\n<annotation/>', 'an XML file of Pascal VOC'),
    ('<annotations><image/></annotations>', 'an XML file, not JSON'),
    ('<!DOCTYPE html><html>Log in</html>', 'a web page'),
    ('filename,width,height,class,xmin\na.jpg,1,1,cat,0\n', 'a table (CSV)'),
    ('a;b;c\n1;2;3\n', 'a table (CSV)'),
    ('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n', 'Run git lfs pull'),
    (zipped(GOOD), 'is a zip archive. Unpack it'),
    (gzip.compress(GOOD.encode()), 'is a gzip archive. Unpack it'),
    (b'\x89PNG\r\n\x1a\n' + b'x' * 50, 'is a PNG picture'),
    ('[]', 'is a list of 0 items'),
    ('3', 'is just 3'),
    ('null', 'is just null'),
    (json.dumps([dict(image_id=1, category_id=4, bbox=[1, 1, 5, 5], score=0.5)]),
     'is a list of results (detections with scores)'),
    (json.dumps([dict(id=1, annotations=[], data=dict(image='a'))]), "Label Studio's own JSON"),
    (json.dumps(dict(version='5.0', shapes=[], imagePath='a.jpg')), "LabelMe's JSON"),
    (json.dumps(VIA), "VIA's own JSON"),
    (json.dumps(dict(_via_settings={}, _via_img_metadata=VIA)), "VIA's own JSON"),
    (json.dumps(dict(metainfo={}, data_list=[])), "OpenMMLab's own form"),
    (json.dumps(dict(type='FeatureCollection', features=[])), 'a GeoJSON file'),
    (json.dumps(dict(images=[], categories=[], annotations=[dict(segments_info=[])])), 'panoptic'),
    (json.dumps(dict(images=[], annotations=[dict(caption='a', image_id=1)])), 'captions'),
    (GOOD.encode('utf-16'), 'is encoded in UTF-16; expected UTF-8'),
    (GOOD.encode('utf-16-le'), 'is encoded in UTF-16; expected UTF-8'),
    (GOOD.encode('utf-32'), 'is encoded in UTF-32; expected UTF-8'),
    (json.dumps(dict(good(), info='Müller'), ensure_ascii=False).encode('latin-1'),
     'is not UTF-8: byte 0xfc at position 11, after \'{"info": "M\''),
    ('{"info": ' + '[' * 9999 + ']' * 9999 + GOOD[1:], 'nests lists or objects too deeply, in line '
                                                       '1, column 10008'),
    (GOOD.replace('1500.5', '1' * 5000, 1), 'has a number of 5000 digits, in line 1, column '),
    (GOOD[:-1] + ', "images": []}', 'has the key "images" 2 times in one object'),
])
def test_files_of_another_kind(folder, data, sentence):
    (folder / 'a.json').write_bytes(data if isinstance(data, bytes) else data.encode())
    text = refused(folder)
    assert sentence in text, text
    assert 'Error' not in text and text.count('\n') <= 2


@pytest.mark.parametrize('data', [
    b'\xef\xbb\xbf' + GOOD.encode(),
    json.dumps(dict(good(), info='Müller, 東京'), ensure_ascii=False).encode(),
    GOOD.replace('{', '\r\n{\t').encode() + b'\r\n\r\n',
    GOOD.replace('"info": {', '"info": {"images": 2, "categories": 1, ').encode(),
])
def test_honest_encodings(folder, data):
    (folder / 'a.json').write_bytes(data)
    assert outcome(folder) == 'used'


def test_the_locale_does_not_matter(folder):
    name = 'größe.jpg'
    (folder / '1.jpg').rename(folder / name)
    content = changed(lambda d, i, a: i[0].update(file_name=name))
    (folder / 'a.json').write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8-sig')
    assert check_classes(config(folder), ['train']) == []
    from pycocotools import coco
    assert coco.open.keywords == dict(encoding='utf-8-sig')
    use(config(folder))


def test_what_is_no_file(folder):
    os.mkfifo(folder / 'a.json')
    assert 'a.json is not a file' in refused(folder)
    (folder / 'a.json').unlink()
    assert 'a.json does not exist' in refused(folder)
    (folder / 'a.json').mkdir()
    assert 'a.json is not a file' in refused(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_file_that_may_not_be_read(folder):
    write(folder, good())
    (folder / 'a.json').chmod(stat.S_IWUSR)
    assert 'a.json cannot be read: Permission denied' in refused(folder)


# Reading ----------------------------------------------------------------------------------------
def test_large_files_are_checked_and_told_of(folder, monkeypatch, capsys):
    write(folder, changed(lambda d, i, a: d['categories'].reverse()))
    monkeypatch.setattr(coco_file, 'LARGE', 500)
    assert 'categories in another order' in refused(folder)
    assert capsys.readouterr().err == f'reading {folder / "a.json"} (0 MB) ...\n'


def test_a_file_is_read_once_until_it_changes(folder, monkeypatch):
    seen = []

    def reading(path, tell):
        seen.append(path)
        return read_coco(path, tell)

    monkeypatch.setattr(coco_records, 'read_coco', reading)
    write(folder, good())
    cfg = config(folder)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    assert check_classes(cfg, ['train', 'val', 'test']) == []
    assert seen == [str(folder / 'a.json')]
    write(folder, changed(set_(0, area='x')))
    assert 'id 1 has "x"' in refused(folder)


def test_torchrun_checks_once_on_each_machine(folder, monkeypatch):
    write(folder, changed(set_(0, area='x')))
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert check_classes(config(folder), ['train', 'val']) == []
    monkeypatch.setenv('LOCAL_RANK', '0')
    refused(folder)


def test_parsing_leaves_the_collector_as_it_was(folder):
    import gc
    write(folder, good())
    read_coco(folder / 'a.json')
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(AnnotationError):
            (folder / 'a.json').write_text('{')
            read_coco(folder / 'a.json')
        assert not gc.isenabled()
    finally:
        gc.enable()


# The metric's own file --------------------------------------------------------------------------
@pytest.mark.parametrize('change, sentence', [
    (lambda d, i, a: d['categories'].reverse(), 'categories in another order'),
    (lambda d, i, a: d['categories'][0].update(name='horse'), "no category for 'cat'"),
    (lambda d, i, a: i.append(dict(i[0], id=3)), 'lists other images (id 3 in one of them only). '
                                                 'Set val_evaluator.ann_file to the file of the '
                                                 'data'),
    (set_(0, iscrowd='x'), '"iscrowd" is not 0 or 1'),
    (polygons(SQUARE[:3]), 'id 1 has a polygon of 3 numbers'),
])
def test_the_file_of_the_metric(folder, change, sentence):
    write(folder, good())
    write(folder, changed(change), 'b.json')
    cfg = config(folder)
    cfg.val_evaluator.ann_file = str(folder / 'b.json')
    with pytest.raises(UserError) as caught:
        check_classes(cfg, ['val'])
    assert sentence in str(caught.value) and str(folder / 'b.json') in str(caught.value)
    cfg.val_evaluator.format_only = True
    assert check_classes(cfg, ['val']) == []


def test_the_file_of_the_metric_may_be_written_anew(folder):
    """Other category ids, other annotations: its own matter."""
    write(folder, good())
    write(folder, changed(lambda d, i, a: (
        a.pop(), d['categories'][0].update(id=5), a[0].update(category_id=5),
        a[2].update(category_id=5))), 'b.json')
    cfg = config(folder)
    cfg.val_evaluator.ann_file = str(folder / 'b.json')
    assert check_classes(cfg, ['val']) == []
    use(cfg)


def test_one_file_for_two_data_sets(folder):
    write(folder, good())
    write(folder, changed(lambda d, i, a: (
        [image.update(id=image['id'] + 10) for image in i],
        [entry.update(image_id=entry['image_id'] + 10) for entry in a])), 'b.json')
    both = changed(lambda d, i, a: i.extend(dict(image, id=image['id'] + 10) for image in list(i)))
    write(folder, both, 'both.json')
    cfg = config(folder)
    first = cfg.val_dataloader.dataset
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        first, dict(first, ann_file='b.json')])
    cfg.val_evaluator.ann_file = str(folder / 'both.json')
    (note,) = check_classes(cfg, ['val'])
    assert 'listed more than once' in note and 'both.json' in note
    cfg.val_evaluator.ann_file = str(folder / 'a.json')
    assert 'lists other images (id 11, 12 in one of them only)' in refused(folder, ['val'], cfg)


def test_a_test_set_without_annotations(folder):
    content = good()
    del content['annotations']
    write(folder, content)
    cfg = config(folder)
    cfg.val_evaluator = [dict(type='CocoMetric', ann_file=str(folder / 'a.json'),
                              format_only=True, outfile_prefix='x')]
    assert check_classes(cfg, ['val']) == []
    assert 'nothing to learn' in refused(folder, ['train'], cfg)
