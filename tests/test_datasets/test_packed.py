"""Folders of images in one LMDB database."""
import multiprocessing
import pickle

import numpy as np
import pytest
from mmengine.fileio import get
from PIL import Image

from mmhybrid import cli
from mmhybrid.datasets.loading.pipeline_guard import guard_image_files
from mmhybrid.datasets.packed import DATABASE, find_database, pack
from mmhybrid.errors import UserError

pytest.importorskip('lmdb')
ARGS = dict(backend='mmhybrid_lmdb')


@pytest.fixture
def folder(tmp_path):
    """Images in a folder and in one below it, and other files."""
    root = tmp_path / 'train'
    (root / 'süd').mkdir(parents=True)
    for number, name in enumerate(('a.jpg', 'süd/b.PNG', 'süd/c d.png')):
        image = np.full((20, 30, 3), 50 * number, np.uint8)
        Image.fromarray(image).save(root / name)
    (root / 'notes.txt').write_text('x')
    return root


def test_files_come_back_as_they_are(folder, capsys):
    names = ['a.jpg', 'süd/b.PNG', 'süd/c d.png']
    before = [(folder / name).read_bytes() for name in names]
    assert cli.main(['pack', str(folder)]) == 0
    assert '3 images' in capsys.readouterr().out
    for name in names:
        (folder / name).unlink()
    assert [get(str(folder / name), backend_args=ARGS) for name in names] == before
    # in a process that was forked while the database was open
    if 'fork' in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context('fork').Pool(1) as pool:
            assert pool.apply(get, (str(folder / names[1]),), dict(backend_args=ARGS)) == before[1]
    assert get(str(folder / names[0]), backend_args=ARGS) == before[0]


def test_databases_are_found_from_below(folder):
    pack(folder)
    assert find_database(str(folder / 'süd' / 'b.PNG')) == (str(folder / DATABASE), 'süd/b.PNG')
    pack(folder / 'süd')  # the nearest one counts
    assert find_database(str(folder / 'süd' / 'b.PNG')) == (
        str(folder / 'süd' / DATABASE), 'b.PNG')
    assert find_database(str(folder.parent / 'other' / 'b.PNG')) is None


def test_what_cannot_be_packed(folder, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match='There is no folder'):
        pack(tmp_path / 'gone')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no images'):
        pack(tmp_path / 'empty')
    pack(folder)
    assert cli.main(['pack', str(folder)]) == 1
    assert '--force replaces it' in capsys.readouterr().err
    Image.new('L', (4, 4)).save(folder / 'new.png')
    assert pack(folder, force=True) == 4
    assert get(str(folder / 'new.png'), backend_args=ARGS)
    assert sorted(path.name for path in folder.iterdir() if 'lmdb' in path.name) == [DATABASE]


def test_what_is_not_in_it(folder):
    with pytest.raises(FileNotFoundError, match=f'No folder .* holds an {DATABASE}'):
        get(str(folder / 'a.jpg'), backend_args=ARGS)
    pack(folder)
    with pytest.raises(FileNotFoundError, match='holds no late.jpg'):
        get(str(folder / 'late.jpg'), backend_args=ARGS)


def test_a_pipeline_names_what_is_wrong(folder):
    """A damaged image in a database is not said to be missing on the disk."""
    mmcv = pytest.importorskip('mmcv.transforms')
    from mmengine.dataset import Compose
    guard_image_files()
    (folder / 'bad.jpg').write_bytes(b'no image' * 40)
    pack(folder)
    (folder / 'bad.jpg').unlink()
    (folder / 'a.jpg').unlink()
    pipeline = pickle.loads(pickle.dumps(Compose([mmcv.LoadImageFromFile(backend_args=ARGS)])))
    assert pipeline(dict(img_path=str(folder / 'a.jpg')))['img'].shape == (20, 30, 3)
    for name in ('bad.jpg', 'gone.jpg'):
        with pytest.raises(UserError, match=name) as error:
            pipeline(dict(img_path=str(folder / name)))
        assert ('does not exist' in str(error.value)) is False
