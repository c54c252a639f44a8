import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco
from mmhybrid.datasets.verify import verify_ade20k, verify_coco


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp('sets')
    write_mini_coco(root / 'coco', 5, 4)
    write_mini_ade20k(root / 'ade', 5, 4)
    return root


@pytest.fixture
def coco(sets, tmp_path):
    shutil.copytree(sets / 'coco', tmp_path / 'coco')
    return tmp_path / 'coco'


@pytest.fixture
def ade(sets, tmp_path):
    shutil.copytree(sets / 'ade', tmp_path / 'ade')
    return tmp_path / 'ade'


def _only(report):
    assert not report.ok
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def _edit(folder, change):
    path = folder / 'annotations' / 'instances_val2017.json'
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_good_sets_pass(coco, ade):
    steps = []
    report = verify_coco(coco, progress=lambda *at: steps.append(at))
    assert report.ok and len(report.facts) == 6
    assert steps[-1][0] == steps[-1][1]
    report = verify_ade20k(ade)
    assert report.ok and len(report.facts) == 4


def test_real_counts_are_expected_without_a_marker(coco, ade):
    (coco / 'mini_set.json').unlink()
    problems = verify_coco(coco).problems
    assert any('lists 5 images, expected 118287' in problem for problem in problems)
    assert any('lists 4 images, expected 5000' in problem for problem in problems)
    (ade / 'mini_set.json').unlink()
    problems = verify_ade20k(ade).problems
    assert any('5 training pairs' in problem and '20210' in problem for problem in problems)
    assert any('4 validation pairs' in problem and '2000' in problem for problem in problems)


def test_nothing_there_says_what_to_fetch(tmp_path):
    problem = _only(verify_coco(tmp_path / 'coco'))
    for part in ('train2017.zip', 'val2017.zip', 'annotations_trainval2017.zip', 'unpack in'):
        assert part in problem
    problem = _only(verify_ade20k(tmp_path / 'ade' / 'ADEChallengeData2016'))
    assert 'ADEChallengeData2016.zip' in problem and 'ADE_train_00000001.jpg exists' in problem


def test_coco_missing_folder(coco):
    shutil.rmtree(coco / 'val2017')
    problem = _only(verify_coco(coco))
    assert 'lacks val2017/' in problem and 'val2017.zip' not in problem
    assert 'train2017' not in problem and '--force' in problem
    (coco / 'mini_set.json').unlink()
    problems = verify_coco(coco, counts={'train2017': 5, 'val2017': 4}).problems
    assert len(problems) == 1 and 'val2017.zip' in problems[0]


def test_coco_missing_image(coco):
    (coco / 'train2017' / '000000000003.jpg').unlink()
    problem = _only(verify_coco(coco))
    assert '1 of 5 images' in problem and '000000000003.jpg' in problem


def test_coco_broken_json(coco):
    path = coco / 'annotations' / 'instances_train2017.json'
    path.write_bytes(path.read_bytes()[:1000])
    problem = _only(verify_coco(coco))
    assert 'not valid JSON' in problem and 'cut short' in problem
    path.write_text('[]')
    problem = _only(verify_coco(coco))
    assert 'is a list of 0 items. Expected' in problem and '--force' in problem


def test_coco_cut_image(coco):
    path = coco / 'val2017' / '000000200002.jpg'
    path.write_bytes(path.read_bytes()[:800])
    problem = _only(verify_coco(coco))
    assert '1 of 4 sampled images' in problem and '000000200002.jpg (cannot be decoded' in problem


def test_coco_image_of_another_size(coco):
    Image.new('RGB', (31, 17)).save(coco / 'val2017' / '000000200001.jpg')
    assert '000000200001.jpg (31x17, the json says' in _only(verify_coco(coco))


def test_coco_other_categories(coco):
    def change(document):
        document['categories'][0]['name'] = 'robot'
    _edit(coco, change)
    problem = _only(verify_coco(coco))
    assert "1: 'robot' instead of 'person'" in problem and 'metainfo' in problem


def test_coco_stray_annotation(coco):
    def change(document):
        document['annotations'][0]['image_id'] = 77
    _edit(coco, change)
    assert '1 annotations belong to images that are not listed' in _only(verify_coco(coco))


def test_ade_missing_annotation(ade):
    (ade / 'annotations' / 'training' / 'ADE_train_00000002.png').unlink()
    problems = verify_ade20k(ade).problems
    assert 'ADE_train_00000002' in problems[0] and 'lack their counterpart' in problems[0]
    assert '4 training pairs' in problems[1]


def test_ade_missing_folder(ade):
    shutil.rmtree(ade / 'annotations' / 'validation')
    assert 'lacks annotations/validation/. Generate' in _only(verify_ade20k(ade))


@pytest.mark.parametrize('content, complaint', [
    (np.full((8, 9), 151, dtype=np.uint8), '9x8, its image is'),
    (np.zeros((8, 9, 3), dtype=np.uint8), 'expected 8-bit grey'),
])
def test_ade_wrong_annotation(ade, content, complaint):
    Image.fromarray(content).save(ade / 'annotations' / 'validation' / 'ADE_val_00000001.png')
    assert complaint in _only(verify_ade20k(ade))


def test_ade_label_out_of_range(ade):
    path = ade / 'annotations' / 'validation' / 'ADE_val_00000001.png'
    labels = np.array(Image.open(path))
    labels[0, 0] = 200
    Image.fromarray(labels).save(path)
    assert 'label 200; expected 0 to 150' in _only(verify_ade20k(ade))
