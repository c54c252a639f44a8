"""Image files that are odd, damaged or hostile, as data pipelines and workers meet them."""
import os
import resource
import struct
import zlib

import numpy as np
import pytest
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from PIL import Image

from mmhybrid.datasets.loading.pipeline_guard import expect_labels, guard_image_files
from mmhybrid.engine.explanations import explain
from mmhybrid.errors import UserError

LOAD = dict(type='LoadImageFromFile')


@pytest.fixture(autouse=True)
def _guard(monkeypatch):
    init_default_scope('mmdet')
    pytest.importorskip('mmdet.datasets')
    monkeypatch.setattr('mmhybrid.datasets.loading.pipeline_guard._expected', {})
    guard_image_files()


def load(path, *steps, **settings):
    """What a pipeline makes of a file; ``steps`` after loading."""
    return Compose([dict(LOAD, **settings), *steps])(dict(img_path=str(path)))


def refusal(path, *steps, **settings):
    with pytest.raises(UserError) as error:
        load(path, *steps, **settings)
    text = explain(error.value)
    assert text == str(error.value) and text.count('\n') == 0, text
    return text


def photograph(path, mode='RGB', **options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).convert(mode)
    image.save(path, **options)
    return path


# --- honest files ------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, suffix', [
    ('RGB', 'jpg'), ('L', 'jpg'), ('CMYK', 'jpg'), ('RGB', 'png'), ('L', 'png'), ('LA', 'png'),
    ('RGBA', 'png'), ('P', 'png'), ('1', 'png'), ('I;16', 'png'), ('RGB', 'webp'), ('RGB', 'bmp'),
    ('RGB', 'tif')])
def test_honest_files_pass(tmp_path, mode, suffix):
    path = tmp_path / f'a.{suffix}'
    if mode == 'I;16':
        Image.fromarray(np.full((24, 32), 40000, np.uint16)).save(path)
    else:
        photograph(path, mode)
    assert load(path)['img'].shape == (24, 32, 3)


def test_an_animated_image_gives_its_first_picture(tmp_path):
    frames = [Image.new('RGB', (32, 24), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'a.webp', save_all=True, append_images=frames[1:], lossless=True)
    blue, green, red = load(tmp_path / 'a.webp', imdecode_backend='pillow')['img'][0, 0]
    assert red > 250 and blue < 5 and green < 5


def test_a_turned_photograph_is_loaded_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    photograph(tmp_path / 'a.jpg', exif=exif)
    assert load(tmp_path / 'a.jpg')['img_shape'] == (32, 24)


def test_a_large_honest_image_passes(tmp_path, monkeypatch):
    """Many pixels in as many bytes as a photograph has; Pillow alone would refuse."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    monkeypatch.setattr('mmhybrid.datasets.loading.pipeline_guard.MANY', 100)
    assert load(photograph(tmp_path / 'a.jpg'))['img'].shape == (24, 32, 3)


def test_links_and_names_pass(tmp_path):
    name = tmp_path / 'ä 100%(1).jpg'
    photograph(name)
    (tmp_path / 'link.jpg').symlink_to(name)
    for path in (name, tmp_path / 'link.jpg'):
        assert load(path)['img'].shape == (24, 32, 3)


# --- damaged files -----------------------------------------------------------------------------

def damaged(path, how):
    suffix = path.suffix
    photograph(path)
    content = bytearray(path.read_bytes())
    if how == 'half':
        del content[len(content) // 2:]
    elif how == 'head':
        del content[20:]
    elif how == 'empty':
        content = b''
    elif how == 'header sum':
        content[29] ^= 1
    elif how == 'data sum':
        content[content.rindex(b'IEND') - 5] ^= 1
    elif how == 'zeros':
        content = bytes(len(content))
    elif how == 'text':
        content = b'name,x,y\na,1,2\n'
    elif how == 'page':
        content = b'<html><body>404 not found</body></html>'
    elif how == 'pointer':
        content = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'
    elif how == 'svg':
        content = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    elif how == 'heic':
        content = b'\0\0\0\x18ftypheic' + bytes(500)
    path.write_bytes(content)
    return path.with_suffix(suffix)


@pytest.mark.parametrize('suffix, how, words', [
    ('jpg', 'half', 'cannot be decoded ('), ('jpg', 'head', 'cannot be decoded (20 bytes'),
    ('png', 'half', 'cannot be decoded ('), ('png', 'header sum', 'cannot be decoded ('),
    ('png', 'data sum', 'cannot be decoded ('), ('jpg', 'zeros', 'damaged or no image'),
    ('jpg', 'empty', 'is empty (0 bytes)'), ('png', 'empty', 'is empty (0 bytes)'),
    ('jpg', 'text', 'is text inside'), ('jpg', 'page', 'is a web page or XML inside'),
    ('jpg', 'pointer', 'is a Git LFS pointer (run: git lfs pull)'),
    ('svg', 'svg', 'is an SVG drawing'), ('heic', 'heic', 'is a HEIC, AVIF or video file')])
@pytest.mark.filterwarnings('ignore')
def test_damaged_and_foreign_files(tmp_path, suffix, how, words):
    path = tmp_path / f'a.{suffix}'
    if suffix in ('svg', 'heic'):
        photograph(tmp_path / 'a.png').rename(path)
        path.write_bytes(damaged(tmp_path / 'b.png', how).read_bytes())
    else:
        damaged(path, how)
    text = refusal(path)
    assert text.startswith(str(path)) and words in text


def test_a_form_that_only_pillow_reads(tmp_path, monkeypatch):
    photograph(tmp_path / 'a.gif')
    monkeypatch.setattr('cv2.imdecode', lambda *args: None)  # OpenCV before 4.11
    text = refusal(tmp_path / 'a.gif')
    assert 'a.gif is in a form' in text and 'imdecode_backend="pillow"' in text
    assert load(tmp_path / 'a.gif', imdecode_backend='pillow')['img'].shape == (24, 32, 3)


# --- files that block, are not there, or fill the memory ---------------------------------------

def special(path, kind):
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'gone link':
        path.symlink_to(path.parent / 'nowhere')
    elif kind == 'loop':
        path.symlink_to(path)
    return path


@pytest.mark.parametrize('kind, words', [
    ('pipe', 'is a pipe; expected an image file'), ('device', 'is a device'),
    ('folder', 'is a folder'), ('gone link', 'is a link to'), ('loop', 'is a link to'),
    ('nothing', 'does not exist, but the data set lists it')])
def test_no_regular_file(tmp_path, kind, words):
    path = special(tmp_path / 'a.jpg', kind)
    text = refusal(path)
    assert text.startswith(f'{path} {words}')


@pytest.mark.parametrize('key', ['pipe', 'device'])
def test_label_images_that_are_no_files(tmp_path, key):
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    image, labels = photograph(tmp_path / 'a.jpg'), special(tmp_path / 'a.png', key)
    with pytest.raises(UserError, match=f'a.png is a {key}'):
        Compose([LOAD, dict(type='LoadAnnotations')])(dict(
            img_path=str(image), seg_map_path=str(labels), reduce_zero_label=False, seg_fields=[]))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = photograph(tmp_path / 'a.jpg')

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('mmengine.fileio.get', refuse)
    assert refusal(path).startswith(f'{path} cannot be read: Permission denied')


def test_limits_of_the_machine_blame_no_image(tmp_path, monkeypatch):
    path = photograph(tmp_path / 'a.jpg')

    def too_many(*args, **kwargs):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr('mmengine.fileio.get', too_many)
    with pytest.raises(OSError) as error:
        load(path)
    assert not isinstance(error.value, UserError) and 'ulimit -n' in explain(error.value)


def bomb(path, side, mode=0):
    """A black PNG of side x side pixels in few bytes, never unpacked here."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack(
            '>I', zlib.crc32(name + data))

    line = bytes(1 + side // 8)
    packer = zlib.compressobj(9)
    data = b''.join(packer.compress(line) for _ in range(side)) + packer.flush()
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack(
        '>IIBBBBB', side, side, 1, mode, 0, 0, 0)) + chunk(b'IDAT', data) + chunk(b'IEND', b''))
    return path


def test_bombs(tmp_path):
    path = bomb(tmp_path / 'a.png', 20000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = refusal(path)
    assert text.startswith(f'{path}: {path.stat().st_size} bytes that unpack to a picture too')
    assert '400000000 pixels' in text and 'Cut it into tiles' in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_bombs_as_label_images(tmp_path):
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    image, labels = photograph(tmp_path / 'a.jpg'), bomb(tmp_path / 'a.png', 20000)
    with pytest.raises(UserError, match='a.png: .* bytes that unpack to a picture too large'):
        Compose([LOAD, dict(type='LoadAnnotations')])(dict(
            img_path=str(image), seg_map_path=str(labels), reduce_zero_label=False, seg_fields=[]))


def test_a_sparse_file_is_not_read(tmp_path):
    path = tmp_path / 'a.jpg'
    with open(path, 'wb') as file:
        file.truncate(2**31)
    assert f'{path} has 2147483648 bytes' in refusal(path)


# --- transforms --------------------------------------------------------------------------------

def test_a_thin_image(tmp_path):
    Image.new('RGB', (1, 4000)).save(tmp_path / 'a.png')
    fits = dict(type='Resize', scale=(4096, 600), keep_ratio=True)
    assert load(tmp_path / 'a.png', fits)['img'].shape == (4000 * 4096 // 4000, 1, 3)
    text = refusal(tmp_path / 'a.png', dict(type='Resize', scale=(1333, 800), keep_ratio=True))
    assert text.startswith(f'{tmp_path}/a.png: Resize would leave no pixel of its short side')
    assert 'the image is 1 x 4000 there' in text


def test_tiny_images_pass(tmp_path):
    Image.new('RGB', (1, 1)).save(tmp_path / 'a.png')
    resized = load(tmp_path / 'a.png', dict(type='Resize', scale=(64, 64), keep_ratio=True))
    assert resized['img'].shape == (64, 64, 3)


def test_no_memory_for_an_image(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise MemoryError('Unable to allocate 9 GiB')

    monkeypatch.setattr('mmcv.imfrombytes', fails)
    assert 'does not fit into memory' in refusal(photograph(tmp_path / 'a.jpg'))


# --- many small damages ------------------------------------------------------------------------

def mutated(content, rng):
    content = bytearray(content)
    how = rng.integers(4)
    place = int(rng.integers(len(content)))
    if how == 0:
        content[place] ^= 1 << int(rng.integers(8))
    elif how == 1:
        del content[place:]
    elif how == 2:
        content[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
    else:  # a size or a length
        content[place:place + 4] = b'\x7f\xff\xff\xff'
    return bytes(content)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'gif', 'tif', 'webp', 'bmp'])
def test_random_damage(tmp_path, suffix):
    """A sample or one line that begins with the file; for images and label images."""
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    image, good = tmp_path / f'a.{suffix}', photograph(tmp_path / 'good.png')
    labels = tmp_path / 'labels'
    labels.mkdir()
    expect_labels(str(labels), 3, 3, 255)
    photograph(image, 'RGB' if suffix in ('jpg', 'webp') else 'P')
    content, rng = image.read_bytes(), np.random.default_rng(0)
    pipeline = Compose([LOAD, dict(type='LoadAnnotations')])
    victim, told = labels / image.name, 0
    for _ in range(40):
        damage = mutated(content, rng)
        image.write_bytes(damage)
        victim.write_bytes(damage)
        for picture, label in ((image, victim), (good, victim)):
            try:
                pipeline(dict(img_path=str(picture), seg_map_path=str(label), seg_fields=[],
                              reduce_zero_label=False))
            except UserError as error:
                told += 1
                assert str(error).startswith((str(image), str(victim))), error
                assert 'could not be loaded' not in str(error), error
    assert told > 10
