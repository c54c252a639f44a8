import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mmhybrid.datasets import mini_coco
from mmhybrid.datasets.categories import COCO_CATEGORIES, COCO_IDS
from mmhybrid.datasets.photographs import PHOTOGRAPHS, load_photographs

TRAIN, VAL = 30, 26


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'mini_coco'
    assert mini_coco.write_mini_coco(path, TRAIN, VAL)
    return path


@pytest.fixture(scope='module', params=['train', 'val'])
def split(request, folder):
    """One split: name, its COCO index and its image folder."""
    path = folder / 'annotations' / f'instances_{request.param}2017.json'
    return request.param, COCO(str(path)), folder / f'{request.param}2017'


def _files(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob('*')) if path.is_file()}


def test_default_counts():
    assert mini_coco.VAL >= 60 and mini_coco.TRAIN >= mini_coco.VAL


def test_categories_are_those_of_coco():
    datasets = pytest.importorskip('mmdet.datasets')
    names = [category['name'] for category in COCO_CATEGORIES]
    assert tuple(names) == tuple(datasets.CocoDataset.METAINFO['classes'])
    ids = [category['id'] for category in COCO_CATEGORIES]
    assert ids == sorted(set(ids)) and ids[0] == 1 and ids[-1] == 90
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert len({category['supercategory'] for category in COCO_CATEGORIES}) == 12
    assert COCO_IDS['zebra'] == 24 and COCO_IDS['toothbrush'] == 90


def test_document_has_the_schema_of_coco(split):
    _, coco, _ = split
    document = coco.dataset
    assert document.keys() == {'info', 'licenses', 'images', 'annotations', 'categories'}
    assert document['info'].keys() == {
        'description', 'url', 'version', 'year', 'contributor', 'date_created'}
    assert all(each.keys() == {'url', 'id', 'name'} for each in document['licenses'])
    assert document['categories'] == COCO_CATEGORIES
    licenses = {each['id'] for each in document['licenses']}
    for image in document['images']:
        assert image.keys() == {'license', 'file_name', 'coco_url', 'height', 'width',
                                'date_captured', 'flickr_url', 'id'}
        assert image['license'] in licenses
        assert image['file_name'] == f'{image["id"]:012d}.jpg'
    for annotation in document['annotations']:
        assert annotation.keys() == {'segmentation', 'area', 'iscrowd', 'image_id', 'bbox',
                                     'category_id', 'id'}
    ids = [annotation['id'] for annotation in document['annotations']]
    assert len(set(ids)) == len(ids)


def test_images_are_where_the_document_says(split):
    name, coco, images = split
    assert len(coco.dataset['images']) == {'train': TRAIN, 'val': VAL}[name]
    assert {path.name for path in images.iterdir()} == {
        image['file_name'] for image in coco.dataset['images']}
    for image in coco.dataset['images']:
        with Image.open(images / image['file_name']) as file:
            assert file.format == 'JPEG' and file.mode == 'RGB'
            assert file.size == (image['width'], image['height'])


def test_areas_and_boxes_agree_with_the_masks(split):
    _, coco, _ = split
    crowds = 0
    for image_id in coco.getImgIds():
        annotations = coco.imgToAnns[image_id]
        assert annotations
        seen = 0
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            seen = seen + mask.astype(int)
            assert annotation['area'] == mask.sum() > 0
            ys, xs = np.nonzero(mask)
            assert annotation['bbox'] == [
                xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            kind = dict if annotation['iscrowd'] else list
            assert isinstance(annotation['segmentation'], kind)
            crowds += annotation['iscrowd']
        # Only the visible part is annotated, so no pixel belongs to two.
        assert np.max(seen) == 1
    assert crowds >= 2


def test_masks_sit_on_the_objects(folder):
    # Without objects the same scene is the bare photograph: it must differ inside the masks and
    # agree outside, but for the anti-aliased edge.
    photographs = load_photographs('val')
    for index in (0, 1, 11):
        canvas, annotations, name = mini_coco.make_scene(index, 'val', photographs)
        rng = np.random.RandomState([0, mini_coco._SPLIT_SEED['val'], index])
        size = mini_coco.SIZES[rng.randint(len(mini_coco.SIZES))]
        bare = mini_coco.drawing.background(photographs[name], size, rng)
        changed = (canvas != bare).any(axis=2)
        document = {'images': [{'id': 1, 'height': size[0], 'width': size[1]}]}
        coco = COCO()
        coco.dataset = {**document, 'annotations': [], 'categories': []}
        coco.createIndex()
        coco.imgs = {1: document['images'][0]}
        union = np.zeros(size, dtype=bool)
        for annotation in annotations:
            union |= coco.annToMask({**annotation, 'image_id': 1}).astype(bool)
        assert changed[union].mean() > 0.99
        edge = changed & ~union
        assert edge.sum() < 0.25 * union.sum()
        grown = np.pad(union, 1)
        near = (grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
                | grown[:-2, :-2] | grown[2:, 2:] | grown[:-2, 2:] | grown[2:, :-2])
        assert not (edge & ~near).any()


def test_every_category_and_varied_sizes(split):
    _, coco, _ = split
    present = {annotation['category_id'] for annotation in coco.dataset['annotations']}
    assert present == {COCO_IDS[kind.name] for kind in mini_coco.KINDS} and len(present) >= 4
    areas = [annotation['area'] for annotation in coco.dataset['annotations']]
    assert max(areas) > 8 * min(areas)


def test_split_is_by_photograph(folder):
    used = {}
    for split in ('train', 'val'):
        document = json.loads(
            (folder / 'annotations' / f'instances_{split}2017.json').read_text())
        used[split] = {image['flickr_url'].rpartition('/')[2] for image in document['images']}
        assert used[split] == set(PHOTOGRAPHS[split])
    assert not used['train'] & used['val']
    ids = {split: mini_coco.FIRST_IMAGE_ID[split] for split in used}
    assert ids['train'] + mini_coco.TRAIN < ids['val']


def test_same_seed_same_bytes_whatever_the_count(folder, tmp_path):
    again = tmp_path / 'mini_coco'
    mini_coco.write_mini_coco(again, TRAIN, VAL)
    assert _files(again) == _files(folder)
    fewer = tmp_path / 'fewer'
    mini_coco.write_mini_coco(fewer, 3, 1)
    shared = [name for name in _files(fewer) if name.endswith('.jpg')]
    assert len(shared) == 4
    assert all(_files(fewer)[name] == _files(folder)[name] for name in shared)
    other = tmp_path / 'other'
    mini_coco.write_mini_coco(other, 3, 1, seed=1)
    assert all(_files(other)[name] != _files(folder)[name] for name in shared)


def test_pixels_are_the_same_on_every_machine():
    # The digest of the first scene. When a change of the generator is intended, raise VERSION and
    # put the new digest here.
    canvas, annotations, _ = mini_coco.make_scene(0, 'train', load_photographs('train'))
    digest = hashlib.sha256(canvas.tobytes() + json.dumps(annotations).encode()).hexdigest()
    assert (mini_coco.VERSION, digest[:16]) == (1, 'd4ce2263370a8ec9')


def test_colors_do_not_tell_the_category():
    photographs = {'train': load_photographs('train')}
    means, owners = [], []
    for index in range(150):
        canvas, annotations, _ = mini_coco.make_scene(index, 'train', photographs['train'])
        for annotation in annotations:
            if annotation['iscrowd']:
                continue
            coco = COCO()
            coco.imgs = {1: {'height': canvas.shape[0], 'width': canvas.shape[1]}}
            mask = coco.annToMask({**annotation, 'image_id': 1}).astype(bool)
            means.append(canvas[mask].mean(axis=0))
            owners.append(annotation['category_id'])
    means, owners = np.array(means), np.array(owners)
    overall = means.mean(axis=0)
    for category in np.unique(owners):
        own = means[owners == category]
        assert len(own) > 50
        # 4 standard errors; a category with a colour of its own is off by 20 of them.
        error = own.std(axis=0) / np.sqrt(len(own))
        assert (np.abs(own.mean(axis=0) - overall) < 4 * error).all()
        # Nor may a category be recognised by always having the same colour.
        assert own.std(axis=0).min() > 0.6 * means.std(axis=0).max()


def test_refuses_to_replace(tmp_path):
    path = tmp_path / 'mini_coco'
    assert mini_coco.write_mini_coco(path, 2, 1)
    before = _files(path)
    assert not mini_coco.write_mini_coco(path, 2, 1)
    with pytest.raises(FileExistsError, match=r'train 2 instead of 3.*--force'):
        mini_coco.write_mini_coco(path, 3, 1)
    assert _files(path) == before
    assert mini_coco.write_mini_coco(path, 3, 1, force=True)
    assert len(list((path / 'train2017').iterdir())) == 3

    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'thesis.txt').write_text('important')
    with pytest.raises(FileExistsError, match='not made by this program'):
        mini_coco.write_mini_coco(mine, 2, 1, force=True)
    assert [path.name for path in mine.iterdir()] == ['thesis.txt']


def test_an_interrupted_run_leaves_nothing(tmp_path):
    path = tmp_path / 'mini_coco'

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mini_coco.write_mini_coco(path, 2, 2, progress=stop)
    assert list(tmp_path.iterdir()) == []
    seen = []
    mini_coco.write_mini_coco(path, 2, 2, progress=lambda *at: seen.append(at))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize('counts', [(0, 1), (1, -2)])
def test_counts_must_be_positive(tmp_path, counts):
    with pytest.raises(ValueError, match='expected at least 1 image'):
        mini_coco.write_mini_coco(tmp_path / 'set', *counts)
