"""Mistakes of a detector by kind: cases made by hand, whose counts and costs are known exactly."""
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmhybrid.analysis.detection_errors import (
    KINDS,
    Found,
    Objects,
    box_overlaps,
    detection_errors,
)

# Places of 100 x 100 pixels that do not touch.
HERE, THERE = (0, 0, 100, 100), (200, 0, 300, 100)
OVER, UNDER = 'false positives', 'false negatives'


def part(box, height):
    """The upper part of a place: its overlap with the whole is height / 100."""
    return (*box[:3], box[1] + height)


def image(objects, found):
    """Objects (box, label[, crowd]), boxes (box, label, score)."""
    return (Objects(np.array([each[0] for each in objects], float).reshape(-1, 4),
                    np.array([each[1] for each in objects], int),
                    np.array([len(each) > 2 and each[2] for each in objects], bool)),
            Found(np.array([each[0] for each in found], float).reshape(-1, 4),
                  np.array([each[1] for each in found], int),
                  np.array([each[2] for each in found], float)))


CASES = {
    'all right': ([(HERE, 0), (THERE, 1)], [(HERE, 0, .9), (THERE, 1, .8)], {}, 1, {}),
    'half is missed': ([(HERE, 0), (THERE, 0)], [(HERE, 0, .9)], dict(missed=1), 51 / 101,
                       {'missed': 50 / 101, UNDER: 50 / 101}),
    # class 0 has nothing, class 1 a wrong box before the right one
    'wrong class': ([(HERE, 0), (THERE, 1)], [(HERE, 1, .9), (THERE, 1, .8)],
                    dict(classification=1), 1 / 4,
                    {'classification': 3 / 4, OVER: 1 / 4, UNDER: 1 / 4}),
    'wrong place': ([(HERE, 0)], [(part(HERE, 40), 0, .9)], dict(localisation=1), 0,
                    {'localisation': 1, UNDER: 1}),
    'just found': ([(HERE, 0)], [(part(HERE, 50), 0, .9)], {}, 1, {}),
    'just wrong': ([(HERE, 0)], [(part(HERE, 49.9), 0, .9)], dict(localisation=1), 0,
                   {'localisation': 1, UNDER: 1}),
    'just near': ([(HERE, 0)], [(part(HERE, 10), 0, .9)], dict(localisation=1), 0,
                  {'localisation': 1, UNDER: 1}),
    'just not near': ([(HERE, 0)], [(part(HERE, 9.9), 0, .9)], dict(background=1, missed=1), 0,
                      {'missed': 1, UNDER: 1}),
    'wrong class and place': ([(HERE, 0)], [(part(HERE, 40), 1, .9)], dict(both=1, missed=1), 0,
                              {'missed': 1, UNDER: 1}),
    'twice, which costs nothing at the end': (
        [(HERE, 0)], [(HERE, 0, .9), (HERE, 0, .8)], dict(duplicate=1), 1, {}),
    'twice': ([(HERE, 0), (THERE, 0)], [(HERE, 0, .9), (HERE, 0, .8), (THERE, 0, .7)],
              dict(duplicate=1), (51 + 50 * 2 / 3) / 101,
              {'duplicate': 50 / 3 / 101, OVER: 50 / 3 / 101}),
    'nothing is there': ([(HERE, 0)], [(THERE, 0, .9), (HERE, 0, .8)], dict(background=1), 1 / 2,
                         {'background': 1 / 2, OVER: 1 / 2}),
    'a class without objects does not count': (
        [(HERE, 0)], [(THERE, 5, .9), (HERE, 0, .8)], dict(background=1), 1, {}),
    # put right, the box would find an object a second time, so it goes
    'wrong place of what is found': (
        [(HERE, 0)], [(part(HERE, 40), 0, .9), (HERE, 0, .8)], dict(localisation=1), 1 / 2,
        {'localisation': 1 / 2, OVER: 1 / 2}),
    'only one of two finds the object': (
        [(HERE, 0), (THERE, 0)],
        [(part(HERE, 40), 0, .9), (part(HERE, 30), 0, .8), (THERE, 0, .7)], dict(localisation=2),
        51 / 3 / 101, {'localisation': 1 - 51 / 3 / 101, OVER: 51 * 2 / 3 / 101,
                       UNDER: 1 / 3 - 51 / 3 / 101}),
    'the surest decides, whatever its kind': (
        [(HERE, 0)], [(HERE, 1, .9), (part(HERE, 40), 0, .8)],
        dict(classification=1, localisation=1), 0, {'classification': 1, UNDER: 1}),
    'of both classes the own one counts first': (
        [(HERE, 0), (part(HERE, 90), 1)], [(part(HERE, 45), 0, .9)],
        dict(localisation=1, missed=1), 0,
        {'localisation': 1 / 2, UNDER: 1}),
    'nothing is found': ([(HERE, 0), (THERE, 1)], [], dict(missed=2), 0, {'missed': 1, UNDER: 1}),
    'nothing to find': ([], [(HERE, 0, .9)], dict(background=1), 0, {}),
    'nothing at all': ([], [], {}, 0, {}),
    'in a crowd': ([(HERE, 0, True), (THERE, 0)], [(part(HERE, 20), 0, .9), (THERE, 0, .8)], {}, 1,
                   {}),
    'another class in a crowd': ([(HERE, 0, True), (THERE, 1)],
                                 [(part(HERE, 20), 1, .9), (THERE, 1, .8)], dict(background=1),
                                 1 / 2, {'background': 1 / 2, OVER: 1 / 2}),
    'mostly outside of a crowd': ([(part(HERE, 40), 0, True), (THERE, 0)],
                                  [(HERE, 0, .9), (THERE, 0, .8)], dict(background=1), 1 / 2,
                                  {'background': 1 / 2, OVER: 1 / 2}),
    'nothing but a crowd': ([(HERE, 0, True)], [(HERE, 0, .9)], {}, 0, {}),
}


@pytest.mark.parametrize('name', CASES)
def test_cases(name):
    objects, found, counts, ap, cost = CASES[name]
    got = detection_errors([image(objects, found)])
    assert {kind: len(got.of_kind(kind)) for kind in KINDS} == {**dict.fromkeys(KINDS, 0), **counts}
    assert got.ap == pytest.approx(ap, abs=1e-12)
    assert got.cost == pytest.approx({**dict.fromkeys((*KINDS, OVER, UNDER), 0), **cost}, abs=1e-12)


def test_a_mistake_says_what_it_is_about():
    first = image([(HERE, 0)], [(HERE, 0, .9)])
    second = image([(HERE, 0), (THERE, 1)], [(part(THERE, 80), 0, .3), (part(HERE, 40), 0, .6)])
    got = detection_errors([first, second])
    (wrong,), (off,) = got.of_kind('classification'), got.of_kind('localisation')
    assert (wrong.image, wrong.found, wrong.object, wrong.score) == (1, 0, 1, .3)
    assert (off.image, off.found, off.object, off.score) == (1, 1, 0, .6)
    assert (wrong.overlap, off.overlap) == pytest.approx((.8, .4))
    assert [each.score for each in got.mistakes] == [.6, .3]


def test_boxes_without_an_area_overlap_nothing():
    flat = np.array([[5., 5, 5, 9], [5, 5, 3, 3]])
    assert box_overlaps(flat, flat).max() == 0
    assert box_overlaps(np.zeros((0, 4)), flat).shape == (0, 2)
    assert detection_errors([image([(HERE, 0)], [((5, 5, 5, 9), 0, .9)])]).of_kind('background')


@pytest.mark.parametrize('seed', range(4))
def test_the_average_precision_is_that_of_coco(seed, capsys):
    """Random boxes near random objects, equal scores and crowds among them."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for number in range(1, 6):
        count, boxes = int(rng.integers(0, 7)), int(rng.integers(0, 15))
        corners = rng.integers(0, 60, (count, 2))
        places = np.concatenate([corners, corners + rng.integers(10, 40, (count, 2))], 1)
        objects = [(place, int(rng.integers(3)), bool(rng.random() < .2)) for place in places]
        found = []
        for _ in range(boxes if count else 0):
            place, label, _ = objects[rng.integers(count)]
            place = place + rng.normal(0, rng.choice([1, 6]), 4)
            place[2:] = np.maximum(place[2:], place[:2] + 1)
            label = label if rng.random() < .8 else int(rng.integers(3))
            found.append((place, label, float(rng.integers(1, 20)) / 20))
        images.append(image(objects, found))
        for of, entries in ((annotations, objects), (results, found)):
            for (left, top, right, bottom), label, more in entries:
                width, height = float(right - left), float(bottom - top)
                entry = dict(image_id=number, category_id=label, area=width * height,
                             bbox=[float(left), float(top), width, height])
                of.append({**entry, 'score': more} if of is results else
                          {**entry, 'iscrowd': int(more), 'id': len(annotations) + 1})
    truth = COCO()
    truth.dataset = dict(images=[dict(id=number) for number in range(1, 6)],
                         annotations=annotations, categories=[dict(id=n) for n in range(3)])
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(results), 'bbox')
    judge.params.iouThrs = np.array([.5])
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval['precision'][0, :, :, 0, -1]
    assert detection_errors(images).ap == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
