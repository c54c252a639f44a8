import hashlib

import numpy as np
import pytest
from PIL import Image

from mmhybrid.datasets import mini_imagenet
from mmhybrid.datasets.photographs import load_photographs

CLASSES = ['donut', 'frisbee', 'kite', 'pizza', 'zebra']


def files(path):
    return {str(each.relative_to(path)): each.read_bytes()
            for each in path.rglob('*') if each.is_file()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'mini_imagenet'
    assert mini_imagenet.write_mini_imagenet(path, 12, 6)
    return path


def test_layout(folder):
    assert {path.name for path in folder.iterdir()} == {'train', 'val', 'mini_set.json'}
    for split, counts in (('train', [2, 3, 2, 2, 3]), ('val', [1, 2, 1, 1, 1])):
        assert sorted(path.name for path in (folder / split).iterdir()) == CLASSES
        assert [len(list((folder / split / name).iterdir())) for name in CLASSES] == counts
    for path in folder.glob('*/*/*'):
        with Image.open(path) as file:
            assert (file.format, file.mode, file.size) == ('JPEG', 'RGB', (64, 64))


def test_same_seed_same_bytes(folder, tmp_path):
    mini_imagenet.write_mini_imagenet(tmp_path / 'again', 12, 6)
    assert files(tmp_path / 'again') == files(folder)
    mini_imagenet.write_mini_imagenet(tmp_path / 'other', 5, 5, seed=7)
    other = files(tmp_path / 'other')
    assert other['train/frisbee/0000.jpg'] != files(folder)['train/frisbee/0000.jpg']
    assert not mini_imagenet.write_mini_imagenet(folder, 12, 6)  # there already
    with pytest.raises(FileExistsError, match='train 12 instead of 5'):
        mini_imagenet.write_mini_imagenet(folder, 5, 6)


def test_pixels_are_the_same_on_every_machine():
    # See the test of the same name for mini COCO.
    canvas, name = mini_imagenet.make_picture(3, 'train', load_photographs('train'))
    digest = hashlib.sha256(canvas.tobytes()).hexdigest()
    assert (mini_imagenet.VERSION, name, digest[:16]) == (1, 'kite', 'f250ba8c1249520e')


def test_colors_do_not_tell_the_class():
    photographs = load_photographs('train')
    pictures = [mini_imagenet.make_picture(index, 'train', photographs) for index in range(250)]
    means = np.array([canvas.mean(axis=(0, 1)) for canvas, _ in pictures])
    owners = np.array([name for _, name in pictures])
    for name in CLASSES:
        own = means[owners == name]
        assert len(own) == 50
        error = own.std(axis=0) / np.sqrt(len(own))
        assert (np.abs(own.mean(axis=0) - means.mean(axis=0)) < 4 * error).all()


def test_a_missing_image_is_noticed(tmp_path):
    mini_imagenet.write_mini_imagenet(tmp_path / 'set', 5, 5)
    assert mini_imagenet.verify_mini_imagenet(tmp_path / 'set').ok
    (tmp_path / 'set/val/kite/0003.jpg').unlink()
    problem, = mini_imagenet.verify_mini_imagenet(tmp_path / 'set').problems
    assert 'has 4 images, expected 5' in problem and '--force' in problem


def test_every_class_needs_an_image(tmp_path):
    with pytest.raises(ValueError, match='--val is 4; expected at least 5 images'):
        mini_imagenet.write_mini_imagenet(tmp_path / 'set', 5, 4)
