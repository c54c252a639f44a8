"""``mmhybrid predict``: what it writes, and what it does when something goes wrong."""
import errno
import json
import os
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from served import served
from shrink import shrink
from trained import trained

import mmhybrid
from mmhybrid.cli import main
from mmhybrid.cli.actions import predict as command
from mmhybrid.prediction.predictor import Predictor

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings('ignore')
pytest.importorskip('mmdet'), pytest.importorskip('mmseg')
CONFIGS = dict(det='cascade_mambavision_mini_coco', seg='upernet_mambavision_mini_ade20k')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """``weights(kind)``: a checkpoint of a small model."""
    folder = tmp_path_factory.mktemp('weights')

    def make(kind):
        path = folder / f'{kind}.pth'
        if not path.exists():
            cfg = shrink(Config.fromfile(ROOT / 'configs' / f'{CONFIGS[kind]}.py'))
            trained(cfg, path, tuple(f'thing {n}' for n in range(150 if kind == 'seg' else 80)))
        return str(path)
    return make


@pytest.fixture(scope='module')
def loaded(weights):
    """One predictor of a kind for all tests of this file."""
    found = {}
    return lambda kind: found.setdefault(kind, mmhybrid.load(weights(kind), device='cpu'))


@pytest.fixture
def predict(loaded, monkeypatch):
    """Run the command with a model that is loaded already."""
    def run(*arguments, kind='det'):
        monkeypatch.setattr(command, 'load', lambda *args, **options: loaded(kind))
        return main(['predict', *map(str, arguments), '--weights', 'w.pth', *(
            ['--score', '0'] if kind == 'det' and '--score' not in arguments else [])])
    return run


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('a.jpg', 'b.png', 'sub/a.jpg', 'z.png'):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'photos'


def written(folder='predictions'):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob('*')
                  if path.is_file())


def content(folder='predictions'):
    return json.loads(Path(folder, 'predictions.json').read_text())


def test_a_folder_by_a_checkpoint_alone(weights, photos, capsys):
    """The whole way, nothing replaced."""
    assert main(['predict', str(photos), '--weights', weights('det'), '--device', 'cpu', '--score',
                 '0', '--batch', '2']) == 0
    assert written() == ['pictures/a.jpg', 'pictures/b.jpg', 'pictures/sub/a.jpg',
                         'pictures/z.jpg', 'predictions.json']
    found = content()
    assert [each['file_name'] for each in found['images']] == ['a.jpg', 'b.png', 'z.png',
                                                               'sub/a.jpg']
    assert len(found['annotations']) == 20 and len(found['categories']) == 80
    assert '20 objects of 4 pictures in predictions/' in capsys.readouterr().out


def test_what_is_asked_for_is_written(predict, photos, capsys):
    assert predict(photos, '--write', 'yolo', 'labelme', '--out', 'x') == 0
    assert written('x') == sorted([
        'data.yaml', 'predictions.json', *(f'{kind}/{name}' for kind, suffix in (
            ('labels', '.txt'), ('labelme', '.json'))
            for name in (f'{stem}{suffix}' for stem in ('a', 'b', 'sub/a', 'z')))])
    assert predict(photos / 'a.jpg', '--write', 'json', '--out', 'y') == 0
    assert written('y') == ['predictions.json']
    assert predict(photos / 'b.png', '--write', 'pictures', '--out', 'y') == 1  # it is in use
    assert 'is not empty' in capsys.readouterr().err and written('y') == ['predictions.json']
    assert predict(photos / 'b.png', '--out', 'y', '--overwrite') == 0
    assert content('y')['images'][0]['file_name'] == 'b.png'


def test_regions(predict, photos):
    assert predict(photos, kind='seg') == 0
    with Image.open('predictions/masks/sub/a.png') as mask:
        assert mask.size == (80, 60) and mask.mode == 'P'
    assert 'pictures/sub/a.jpg' in written()
    assert predict(photos, kind='seg') == 0 and Path('predictions-2/masks/z.png').is_file()


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(predict, photos, capsys):
    (photos / 'b.png').write_text('hello')
    (photos / 'c.jpg').touch()
    (photos / 'd.jpg').symlink_to(photos / 'absent')
    assert predict(photos, '--batch', '3') == 1
    out, err = capsys.readouterr()
    for name in ('b.png', 'c.jpg', 'd.jpg'):
        (line,) = [line for line in err.splitlines() if 'NOT USED' in line and name in line]
        assert 'leave it out' in line or 'Fetch' in line
    assert 'data set' not in err and 'Traceback' not in err
    assert '3 of 6 could not be used' in out
    assert [each['file_name'] for each in content()['images']] == ['a.jpg', 'z.png', 'sub/a.jpg']


def test_addresses_in_a_list(predict, photos, tmp_path, capsys):
    (photos / 'text.png').write_text('hello')
    (photos / 'film.mp4').write_text('hello')
    with served(photos) as address:
        names = ('a.jpg?key=secret', 'text.png', 'film.mp4', 'absent.png', 'short.png')
        (tmp_path / 'list.txt').write_text('\n'.join(f'{address}/{name}' for name in names))
        assert predict('list.txt', '--write', 'labelme') == 1
    err = capsys.readouterr().err
    for name in names[1:]:
        (line,) = [line for line in err.splitlines() if 'NOT USED' in line and name in line]
        assert line.startswith(f'NOT USED: {address}/{name}')
    assert 'mmhybrid-' not in err and 'secret' not in err
    assert [each['file_name'] for each in content()['images']] == ['a.jpg']
    assert json.loads(Path('predictions/labelme/a.json').read_text())['imagePath'] == 'a.jpg'


def test_a_camera_that_is_not_there(predict, capsys):
    assert predict('63') == 1
    assert 'NOT USED: camera 63 cannot be opened. Is it plugged in' in capsys.readouterr().err


def test_nothing_at_all_can_be_read(predict, tmp_path, capsys):
    (tmp_path / 'c.jpg').touch()
    assert predict('c.jpg') == 1
    assert '1 of 1 could not be used' in capsys.readouterr().out
    assert not Path('predictions').exists()


def test_a_picture_that_the_model_cannot_take(predict, photos, capsys):
    """A line of a thousand pixels loses its short side; a batch with it is repeated without."""
    Image.fromarray(np.zeros((1, 4000, 3), np.uint8)).save(photos / 'b.png')
    assert predict(photos, '--batch', '4') == 1
    assert 'b.png: Resize would leave no pixel' in capsys.readouterr().err
    assert len(content()['images']) == 3


def test_no_memory_for_one_picture(predict, photos, capsys, monkeypatch):
    run = Predictor.look

    def look(self, pictures, wanted, progress):
        if any(picture.source.endswith('b.png') for picture in pictures):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return run(self, pictures, wanted, progress)

    monkeypatch.setattr(Predictor, 'look', look)
    assert predict(photos, '--batch', '4') == 1
    err = capsys.readouterr().err
    assert 'b.png: the memory does not suffice for a picture of 80 x 60' in err and '--tile' in err
    assert len(content()['images']) == 3


def test_a_fault_of_ours_keeps_what_is_done(predict, photos, capsys, monkeypatch):
    run = Predictor.look

    def look(self, pictures, wanted, progress):
        if pictures[0].source.endswith('z.png'):
            raise RuntimeError('a fault')
        return run(self, pictures, wanted, progress)

    monkeypatch.setattr(Predictor, 'look', look)
    assert predict(photos) == 1
    assert 'Traceback' in capsys.readouterr().err and len(content()['images']) == 2


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_keeps_what_is_done(predict, photos, capsys, monkeypatch, number, code):
    run = Predictor.look

    def look(self, pictures, wanted, progress):
        if pictures[0].source.endswith('z.png'):
            os.kill(os.getpid(), number)
        return run(self, pictures, wanted, progress)

    monkeypatch.setattr(Predictor, 'look', look)
    before = signal.getsignal(number)
    assert predict(photos) == code
    assert signal.getsignal(number) == before
    assert written() == ['pictures/a.jpg', 'pictures/b.jpg', 'predictions.json']
    assert len(content()['images']) == 2
    assert 'Stopped after 2 pictures' in capsys.readouterr().out


def test_a_full_disk_keeps_what_is_done(predict, photos, capsys, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if 'z.jpg' in path.name:
            write(path, content[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, 'write_bytes', full)
    assert predict(photos) == 1
    err = capsys.readouterr().err
    assert 'predictions/pictures/z.jpg could not be written: No space left on device.' in err
    assert '2 pictures done, in predictions/' in err and 'Traceback' not in err
    assert written() == ['pictures/a.jpg', 'pictures/b.jpg', 'predictions.json']


def test_nothing_is_found(predict, photos, capsys):
    assert predict(photos, '--score', '0.9') == 0
    out = capsys.readouterr().out
    assert '0 objects of 4 pictures' in out
    assert '4 pictures without an object of score 0.9' in out
    assert content()['annotations'] == [] and 'pictures/z.jpg' in written()


def film(path, count):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (64, 48))
    for number in range(count):
        video.write(np.full((48, 64, 3), 40 * number, np.uint8))
    video.release()


def test_a_video_becomes_a_video(predict, capsys):
    film('clip.avi', 5)
    assert predict('clip.avi', '--batch', '2', '--write', 'pictures', 'yolo') == 0
    video = cv2.VideoCapture('predictions/videos/clip.mp4')
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and video.get(cv2.CAP_PROP_FPS) == 12
    assert [each['file_name'] for each in content()['images']] == [
        f'clip/{number:06d}.jpg' for number in range(1, 6)]
    assert 'labels/clip/000005.txt' in written()


def test_a_video_among_pictures_that_is_cut_off(predict, photos, capsys):
    film(photos / 'clip.avi', 5)
    whole = (photos / 'clip.avi').read_bytes()
    (photos / 'c.mp4').write_bytes(b'nothing')
    (photos / 'clip.avi').write_bytes(whole[:len(whole) * 2 // 3])
    assert predict(photos) == 1
    out, err = capsys.readouterr()
    assert 'c.mp4 cannot be opened' in err and 'clip.avi' in err
    assert '2 of 6 could not be used' in out
    assert 'pictures/z.jpg' in written() and 'pictures/sub/a.jpg' in written()


@pytest.mark.parametrize(('arguments', 'message'), [
    (('absent',), 'There is no absent'), (('photos', '--write', 'png'), '--write knows'),
    (('photos', '--write', 'masks'), '--write masks is for segmentors'),
    (('photos', '--classes', 'cat'), "no class 'cat'"), (('photos', '--tile', '1'), 'Tiles of 1'),
    (('photos', '--out', 'photos/a.jpg'), 'is a file; expected a folder'),
    (('photos', '--out', ' '), '--out is empty')])
def test_mistakes_end_before_anything_is_written(predict, photos, capsys, arguments, message):
    assert predict(*arguments) == 1
    err = capsys.readouterr().err
    assert message in err and 'Traceback' not in err
    assert not Path('predictions').exists()


def test_without_pycocotools(predict, photos, capsys, monkeypatch):
    """mmseg does not bring it along."""
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    assert predict(photos, kind='seg') == 1
    err = capsys.readouterr().err
    assert 'pip install pycocotools' in err and 'Traceback' not in err
    assert not Path('predictions').exists()


def test_progress(capsys, monkeypatch):
    """Lines of a log come at intervals and at the end; that of the tiles only while they last."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(command.time, 'monotonic', lambda: next(clock))
    for last, lines in ((True, 4), (False, 3)):
        progress = command._Progress(last)
        for done in range(10):
            progress('picture', done + 1, 10)
        found = capsys.readouterr().err.splitlines()
        assert len(found) == lines and found[0] == 'picture 3 of 10, 4.00 s each, about 28 s left'
    progress('camera 0: picture', 3, None)
    progress('camera 0: picture', 4, None)
    assert capsys.readouterr().err.splitlines()[0].startswith('camera 0: picture 4, ')


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(['predict', '--help'])
    assert '--weights RUN_OR_CHECKPOINT' in capsys.readouterr().out
