import hashlib

import numpy as np
import pytest
from PIL import Image

from mmhybrid.datasets import mini_ade20k
from mmhybrid.datasets.categories import ADE20K_LABELS, ADE20K_NAMES
from mmhybrid.datasets.photographs import PHOTOGRAPHS, load_photographs

TRAIN, VAL = 24, 20


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'ADEChallengeData2016'
    assert mini_ade20k.write_mini_ade20k(path, TRAIN, VAL)
    return path


def test_default_counts():
    assert mini_ade20k.VAL >= 60 and mini_ade20k.TRAIN >= mini_ade20k.VAL
    assert len(mini_ade20k.CLASSES) >= 8


def test_names_are_those_of_ade20k():
    datasets = pytest.importorskip('mmseg.datasets')
    names = [name.strip() for name in datasets.ADE20KDataset.METAINFO['classes']]
    assert list(ADE20K_NAMES) == names
    assert ADE20K_LABELS['wall'] == 1 and ADE20K_LABELS['flag'] == 150


def test_layout(folder):
    assert {path.name for path in folder.iterdir()} == {
        'images', 'annotations', 'objectInfo150.txt', 'sceneCategories.txt', 'mini_set.json'}
    for split, count, where in (('train', TRAIN, 'training'), ('val', VAL, 'validation')):
        stems = [f'ADE_{split}_{number:08d}' for number in range(1, count + 1)]
        images = sorted(path.name for path in (folder / 'images' / where).iterdir())
        labels = sorted(path.name for path in (folder / 'annotations' / where).iterdir())
        assert images == [f'{stem}.jpg' for stem in stems]
        assert labels == [f'{stem}.png' for stem in stems]


@pytest.mark.parametrize('where', ['training', 'validation'])
def test_labels(folder, where):
    seen = np.zeros(256, dtype=int)
    for path in sorted((folder / 'annotations' / where).iterdir()):
        with Image.open(path) as file:
            assert file.format == 'PNG' and file.mode == 'L'
            labels = np.asarray(file)
        with Image.open(folder / 'images' / where / f'{path.stem}.jpg') as file:
            assert file.format == 'JPEG' and file.mode == 'RGB'
            assert file.size == labels.shape[::-1]
        seen += np.bincount(labels.ravel(), minlength=256)
    allowed = {0, *(ADE20K_LABELS[name] for name in mini_ade20k.CLASSES)}
    assert set(np.flatnonzero(seen).tolist()) == allowed
    # "Other" is there, so that mixing up 0 and 1 would show.
    assert 0.01 < seen[0] / seen.sum() < 0.2


def test_mmseg_reads_it_with_zero_reduced(folder):
    pytest.importorskip('mmseg')
    from mmengine.registry import DATASETS
    from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    dataset = DATASETS.build(dict(
        type='mmseg.ADE20KDataset', data_root=str(folder),
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=[dict(type='LoadImageFromFile'),
                  dict(type='mmseg.LoadAnnotations', reduce_zero_label=True),
                  dict(type='mmseg.PackSegInputs')]))
    assert len(dataset) == VAL
    sample = dataset[0]['data_samples'].gt_sem_seg.data.numpy()[0]
    with Image.open(folder / 'annotations/validation/ADE_val_00000001.png') as file:
        raw = np.asarray(file).astype(int)
    assert np.array_equal(sample, np.where(raw == 0, 255, raw - 1))


def test_object_info_counts_this_set(folder):
    lines = (folder / 'objectInfo150.txt').read_text().splitlines()
    assert lines[0].split('\t') == ['Idx', 'Ratio', 'Train', 'Val', 'Name']
    rows = [line.split('\t') for line in lines[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, 151))
    assert tuple(row[4] for row in rows) == ADE20K_NAMES
    present = {row[4] for row in rows if int(row[2]) > 0}
    assert present == set(mini_ade20k.CLASSES)
    wall = rows[0]
    assert (int(wall[2]), int(wall[3])) == (TRAIN, VAL)
    assert 0.8 < sum(float(row[1]) for row in rows) < 1  # the rest is "other"


def test_split_is_by_photograph(folder):
    used = {'train': set(), 'val': set()}
    for line in (folder / 'sceneCategories.txt').read_text().splitlines():
        stem, photograph = line.split(' ')
        used[stem.split('_')[1]].add(photograph)
    for split, names in used.items():
        assert names == {name.rpartition('.')[0] for name in PHOTOGRAPHS[split]}
    assert not used['train'] & used['val']


def test_same_seed_same_bytes(folder, tmp_path):
    def files(path):
        return {str(each.relative_to(path)): each.read_bytes()
                for each in path.rglob('*') if each.is_file()}

    again = tmp_path / 'again'
    mini_ade20k.write_mini_ade20k(again, TRAIN, VAL)
    assert files(again) == files(folder)
    other = tmp_path / 'other'
    mini_ade20k.write_mini_ade20k(other, 1, 1, seed=7)
    name = 'images/training/ADE_train_00000001.jpg'
    assert files(other)[name] != files(folder)[name]


def test_pixels_are_the_same_on_every_machine():
    # See the test of the same name for mini COCO.
    canvas, labels, _ = mini_ade20k.make_scene(0, 'train', load_photographs('train'))
    digest = hashlib.sha256(canvas.tobytes() + labels.tobytes()).hexdigest()
    assert (mini_ade20k.VERSION, digest[:16]) == (1, 'ad51a3ff41f30fc9')


def test_colors_do_not_tell_the_class():
    photographs = load_photographs('train')
    means, owners = [], []
    for index in range(150):
        canvas, labels, _ = mini_ade20k.make_scene(index, 'train', photographs)
        for label in np.unique(labels):
            if label not in (0, ADE20K_LABELS['wall']):
                means.append(canvas[labels == label].mean(axis=0))
                owners.append(label)
    means, owners = np.array(means), np.array(owners)
    overall = means.mean(axis=0)
    for label in np.unique(owners):
        own = means[owners == label]
        assert len(own) > 20
        error = own.std(axis=0) / np.sqrt(len(own))
        assert (np.abs(own.mean(axis=0) - overall) < 4 * error).all()
        assert own.std(axis=0).min() > 0.5 * means.std(axis=0).max()


def test_counts_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match='--val is 0; expected at least 1 image'):
        mini_ade20k.write_mini_ade20k(tmp_path / 'set', 1, 0)
