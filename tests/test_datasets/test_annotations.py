"""Checks of annotation files of one's own."""
import copy

import pytest

from mmhybrid.datasets.annotations import check_coco
from mmhybrid.datasets.coco_records import coco_records

POLYGON = [[0, 0, 9, 0, 9, 9]]
GOOD = dict(
    images=[dict(id=5, file_name='a b/ä.jpg', width=40, height=30),
            dict(id=9, file_name='c.jpg', width=40, height=30)],
    annotations=[dict(id=i, image_id=5, category_id=number, bbox=[1, 2, 10, 10], area=100,
                      segmentation=POLYGON) for i, number in enumerate((40, 7))],
    categories=[dict(id=40, name='dog'), dict(id=7, name='big cat')])


def check(change=None, masks=True, train=True, classes=('dog', 'big cat'), **options):
    content = copy.deepcopy(GOOD)
    if change is not None:
        change(content, content['images'][0], content['annotations'][0])
    records, problems = coco_records(content)
    if problems:
        return '; '.join(problems), '', ''
    problems, notes, summary = check_coco(records, classes, masks, train, **options)
    return '; '.join(problems), '; '.join(notes), summary


def test_a_good_file():
    used = '2 of 2 images and 2 of 2 annotations are used; 2 without iscrowd count as 0'
    assert check() == check(train=False) == ('', '', used)
    assert check(filter_cfg=dict(filter_empty_gt=True))[2].startswith(
        '1 of 2 images and 2 of 2 annotations are used; left out: 1 image without an annotation '
        'of these classes (filter_cfg.filter_empty_gt);')


@pytest.mark.parametrize('change, problem', [
    (lambda d, i, a: d.pop('annotations'), 'nothing to learn'),
    (lambda d, i, a: d['images'].clear(), 'lists no images'),
    (lambda d, i, a: a.pop('area'), 'annotations without "area"'),
    (lambda d, i, a: i.pop('width'), 'images without "width"'),
    (lambda d, i, a: a.update(id=1), 'annotation id 1 2 times'),
    (lambda d, i, a: i.update(id=9), 'image id 9 2 times'),
    (lambda d, i, a: a.update(bbox=[1, 2, 3]), 'not four numbers'),
    (lambda d, i, a: a.pop('segmentation'), '(id 0) without a segmentation'),
    (lambda d, i, a: a.update(segmentation=POLYGON[0]), 'id 0 has 0 in place of a polygon'),
    (lambda d, i, a: d['categories'].reverse(), 'in another order'),
    (lambda d, i, a: d['categories'][1].update(name='Big cat'), "did you mean 'Big cat'?"),
    (lambda d, i, a: d['categories'].append(dict(id=1, name='dog')), 'more than one category'),
    (lambda d, i, a: [x.update(image_id=1) for x in d['annotations']], 'that can be used'),
])
def test_problems(change, problem):
    assert problem in check(change)[0]


@pytest.mark.parametrize('change, note', [
    (lambda d, i, a: a.update(bbox=[1, 2, 0, 9]), '(id 0) whose box has no area'),
    (lambda d, i, a: a.update(image_id=1), '(id 0) of images that are not listed'),
    (lambda d, i, a: a.update(category_id=1), 'not a listed category'),
])
def test_what_is_left_out(change, note):
    problems, notes, summary = check(change)
    assert not problems and note in notes
    assert '1 of 2 annotations are used; left out: 1 annotation ' in summary
    assert note.rpartition(') ')[2] in summary


def test_boxes_need_no_masks():
    assert check(lambda d, i, a: a.pop('segmentation'), masks=False)[0] == ''


def test_images_are_looked_for(tmp_path):
    (tmp_path / 'a b').mkdir()
    (tmp_path / 'a b' / 'ä.jpg').touch()
    records, _ = coco_records(GOOD)
    (problem,), _, _ = check_coco(records, ('dog', 'big cat'), True, True, folder=str(tmp_path))
    assert '(1 of 2 looked for)' in problem and 'c.jpg' in problem
