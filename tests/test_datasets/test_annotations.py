"""Checks of annotation files of one's own."""
import copy

import pytest

from mmhybrid.datasets.annotations import check_coco

POLYGON = [[0, 0, 9, 0, 9, 9]]
GOOD = dict(
    images=[dict(id=5, file_name='a b/ä.jpg', width=40, height=30),
            dict(id=9, file_name='c.jpg', width=40, height=30)],
    annotations=[dict(id=i, image_id=5, category_id=number, bbox=[1, 2, 10, 10], area=100,
                      segmentation=POLYGON) for i, number in enumerate((40, 7))],
    categories=[dict(id=40, name='dog'), dict(id=7, name='big cat')])
LEFT_OUT = '1 of 2 images have no object'


def check(change=None, masks=True, train=True, classes=('dog', 'big cat')):
    content = copy.deepcopy(GOOD)
    if change is not None:
        change(content, content['images'][0], content['annotations'][0])
    problems, notes = check_coco(content, classes, masks, train)
    return '; '.join(problems), '; '.join(notes)


def test_a_good_file():
    problems, notes = check()
    assert not problems and LEFT_OUT in notes
    assert check(train=False) == ('', '')


@pytest.mark.parametrize('change, problem', [
    (lambda d, i, a: d.pop('annotations'), 'nothing to learn'),
    (lambda d, i, a: d['images'].clear(), 'lists no images'),
    (lambda d, i, a: a.pop('area'), 'annotations without "area"'),
    (lambda d, i, a: i.pop('width'), 'images without "width"'),
    (lambda d, i, a: a.update(id=1), 'annotation id 1 2 times'),
    (lambda d, i, a: i.update(id=9), 'image id 9 2 times'),
    (lambda d, i, a: a.update(bbox=[1, 2, 3]), 'not four numbers'),
    (lambda d, i, a: a.pop('segmentation'), '(id 0) without a segmentation'),
    (lambda d, i, a: a.update(segmentation=POLYGON[0]), '(id 0) without a segmentation'),
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
    (lambda d, i, a: a.update(category_id=1), 'no listed category'),
])
def test_what_is_left_out(change, note):
    problems, notes = check(change)
    assert not problems and note in notes


def test_boxes_need_no_masks():
    assert check(lambda d, i, a: a.pop('segmentation'), masks=False)[0] == ''


def test_images_are_looked_for(tmp_path):
    (tmp_path / 'a b').mkdir()
    (tmp_path / 'a b' / 'ä.jpg').touch()
    (problem,), _ = check_coco(GOOD, ('dog', 'big cat'), True, True, str(tmp_path))
    assert '(1 of 2 looked for)' in problem and 'c.jpg' in problem
