"""Tiles, outlines, sources and files of predictions; no model is needed."""
import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from served import served

from mmhybrid.errors import UserError
from mmhybrid.prediction.files import (
    NotWritten,
    Results,
    check_apart,
    new_folder,
)
from mmhybrid.prediction.outlines import joined, outlines
from mmhybrid.prediction.results import Detection, Segmentation, encoded
from mmhybrid.prediction.sources import Frames, Item, fetched, find_items
from mmhybrid.prediction.tiles import (
    _placed,
    merge_detections,
    merge_segmentations,
    tiles_of,
)
from mmhybrid.visualization import class_colors

NAMES = ('a', 'b', 'c')


# --- tiles ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(10, 10), (64, 64), (65, 64), (200, 100), (99, 1000), (64, 128)])
@pytest.mark.parametrize('overlap', [0, 0.2, 0.5, 0.9])
def test_tiles_cover_a_picture_evenly(size, overlap):
    tiles = tiles_of(size, 64, overlap)
    seen = np.zeros(size, int)
    for tile in tiles:
        part = seen[tile.top:tile.bottom, tile.left:tile.right]
        assert part.shape == (min(64, size[0]), min(64, size[1]))
        part += 1
    assert seen.min() > 0
    for start, end in (('left', 'right'), ('top', 'bottom')):
        spans = sorted({(getattr(each, start), getattr(each, end)) for each in tiles})
        for (_, one), (other, _) in zip(spans, spans[1:], strict=False):
            assert one - other >= int(64 * overlap) - 1


def shown(objects, tiles, size, masks=True):
    """What a perfect detector finds in each tile: (box, label, score) clipped to the tile."""
    parts = []
    for tile in tiles:
        found = []
        for box, label, score in objects:
            box = np.array([*np.maximum(box[:2], tile[:2]), *np.minimum(box[2:], tile[2:])])
            if (box[2:] - box[:2] >= 2).all():
                found.append((box - np.array(tile[:2] * 2), label, score))
        rles = []
        for (left, top, right, bottom), _, _ in found:
            mask = np.zeros((tile.bottom - tile.top, tile.right - tile.left), bool)
            mask[int(top):int(bottom), int(left):int(right)] = True
            rles.append(encoded(mask))
        parts.append(made(found, mask.shape if found else (1, 1), rles if masks else None))
    return parts


def made(found, size, rles):
    return Detection('p', size, np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
                     np.array([score for *_, score in found], np.float32),
                     np.array([label for _, label, _ in found], np.int64), NAMES, rles)


@pytest.mark.parametrize('masks', [True, False])
@pytest.mark.parametrize('box', [
    (5, 5, 15, 15), (50, 20, 66, 40), (40, 40, 60, 60), (3, 30, 190, 50), (60, 10, 64, 14),
    (0, 0, 200, 100), (46, 0, 50, 100)])
def test_an_object_is_found_once_wherever_it_lies(box, masks):
    """Within one tile, within the overlap, across two or all tiles; even cut at every side."""
    size, other = (100, 200), (150, 70, 160, 90)
    tiles = tiles_of(size, 64, 0.3)
    parts = shown([(box, 1, 0.8), (other, 2, 0.9)], tiles, size, masks)
    found = merge_detections(parts, tiles, made([], size, [] if masks else None))
    assert found.labels.tolist() == [2, 1] and found.scores.tolist() == pytest.approx([0.9, 0.8])
    assert found.boxes[1].tolist() == list(box) and found.boxes[0].tolist() == list(other)
    if masks:
        expected = np.zeros(size, bool)
        expected[box[1]:box[3], box[0]:box[2]] = True
        assert np.array_equal(found.masks[1], expected)
    else:
        assert found.masks is None


def test_neighbours_of_one_class_stay_apart():
    """Also those that overlap: the detector has told them apart within one tile."""
    size = (64, 110)
    tiles = tiles_of(size, 64, 0.25)
    objects = [((30, 10, 52, 30), 0, 0.9), ((50, 10, 62, 30), 0, 0.8), ((52, 40, 60, 50), 0, 0.7)]
    found = merge_detections(shown(objects, tiles, size), tiles, made([], size, []))
    assert found.boxes.tolist() == [list(box) for box, _, _ in objects]


def test_a_part_that_looks_like_something_else_joins_the_whole():
    size = (64, 110)
    tiles = tiles_of(size, 64, 0.25)
    (first, second) = shown([((40, 10, 60, 30), 0, 0.9)], tiles, size)
    second.labels[:], second.scores[:] = 1, 0.95
    found = merge_detections([first, second], tiles, made([], size, []))
    assert found.labels.tolist() == [0] and found.boxes.tolist() == [[40, 10, 60, 30]]
    assert found.scores.tolist() == pytest.approx([0.9])


def test_nothing_in_any_tile():
    tiles = tiles_of((100, 200), 64, 0.3)
    empty = made([], (100, 200), [])
    assert len(merge_detections([empty] * len(tiles), tiles, empty)) == 0


def test_run_lengths_within_a_large_picture():
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = rng.integers(1, 9, 2)
        mask = rng.random((height, width)) < 0.6
        top, left = rng.integers(0, 3, 2)
        whole = np.zeros((top + height + rng.integers(0, 2), left + width + rng.integers(0, 2)),
                         bool)
        whole[top:top + height, left:left + width] = mask
        assert _placed(mask, int(left), int(top), whole.shape)['counts'] == encoded(whole)['counts']


def test_maps_of_tiles_give_back_the_map():
    whole = np.random.default_rng(0).integers(0, 3, (150, 210), dtype=np.uint8)
    for side, overlap in ((64, 0.3), (64, 0), (300, 0.2), (150, 0.9)):
        tiles = tiles_of(whole.shape, side, overlap)
        parts = [Segmentation('p', tile.cut(whole), NAMES, ()) for tile in tiles]
        empty = Segmentation('p', np.full_like(whole, 255), NAMES, ())
        assert np.array_equal(merge_segmentations(parts, tiles, empty).map, whole)


# --- outlines -------------------------------------------------------------------------------------

def filled(polygons, shape):
    """Painted four times as fine, so that half a pixel counts; holes by the even-odd rule."""
    image = np.zeros((shape[0] * 4, shape[1] * 4), np.uint8)
    for polygon in polygons:
        part = np.zeros_like(image)
        cv2.fillPoly(part, [np.round(np.array(polygon) * 4 - 0.5).astype(np.int32)], 1)
        image |= part
    return image


def test_outlines_hold_the_mask():
    mask = np.zeros((60, 80), np.uint8)
    cv2.circle(mask, (30, 30), 20, 1, -1)
    cv2.circle(mask, (30, 30), 8, 0, -1)  # a ring, something in its hole, and two parts aside
    cv2.circle(mask, (30, 30), 3, 1, -1)
    mask[5:15, 60:75], mask[50, 70] = 1, 1
    parts = outlines(mask.astype(bool))
    assert len(parts) == 4
    fine = mask.repeat(4, axis=0).repeat(4, axis=1)
    for polygons in (parts, [joined(parts)]):
        drawn = filled(polygons, mask.shape)
        assert (drawn & fine).sum() / (drawn | fine).sum() > 0.93


@pytest.mark.parametrize('where', [(slice(3, 4), slice(5, 6)), (slice(0, 10), slice(0, 12)),
                                   (slice(0, 1), slice(0, 12))])
def test_outlines_of_small_and_of_full_masks(where):
    mask = np.zeros((10, 12), bool)
    mask[where] = True
    ((*points,),) = outlines(mask)
    rows, columns = np.nonzero(mask)
    assert len(points) >= 3
    box = [*np.min(points, axis=0), *np.max(points, axis=0)]
    np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1],
                               atol=0.2)
    assert outlines(np.zeros((3, 3), bool)) == []


def test_colours_of_classes_differ():
    colors = class_colors(150)
    assert len(set(colors)) == 150 and class_colors(3) == colors[:3] and class_colors(0) == []
    assert all(0 <= part <= 255 for color in colors for part in color)


# --- sources --------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    for name in ('b10.JPG', 'b9.png', 'sub/a.tif', 'sub/clip.MP4', '.hidden.jpg', '.git/x.png',
                 'notes.txt', 'sub/._a.jpg', 'predictions/pictures/b9.jpg',
                 'predictions/predictions.json', 'out/c.jpg'):
        (tmp_path / 'data' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / name).touch()
    (tmp_path / 'data' / 'sub' / 'loop').symlink_to(tmp_path / 'data')
    return tmp_path / 'data'


def test_a_folder_with_all_that_lies_about(folder):
    items, notes = find_items([str(folder)], folder / 'out')
    assert [(item.name, item.kind) for item in items] == [
        ('b9.png', 'image'), ('b10.JPG', 'image'), ('sub/a.tif', 'image'),
        ('sub/clip.MP4', 'video')]
    assert notes[0] == f'{folder}/predictions holds predictions and is left out'
    assert notes[1].endswith('(1): notes.txt')


def test_patterns_lists_and_files(folder, tmp_path, monkeypatch):
    (folder / 'sub' / 'loop').unlink()
    found, _ = find_items([f'{folder}/**/b*'])
    assert [item.name for item in found] == ['b9.png', 'b10.JPG', 'predictions/pictures/b9.jpg']
    (tmp_path / 'list.txt').write_text('data/b9.png\n\ndata/sub/a.tif\nhttps://host/x/y.png?a=1\n')
    found, _ = find_items([str(tmp_path / 'list.txt')])
    assert [(item.name, item.kind) for item in found] == [
        ('b9.png', 'image'), ('sub/a.tif', 'image'), ('y.png', 'address')]
    monkeypatch.chdir(tmp_path)
    (folder / 'list.lst').write_text('data/b9.png\nmissing.png\n')  # from where the command runs
    assert [item.path for item in find_items(['data/list.lst'])[0]] == [
        'data/b9.png', 'missing.png']
    (tmp_path / 'odd[1].png').touch()  # a name that looks like a pattern
    assert [item.name for item in find_items(['odd[1].png'])[0]] == ['odd[1].png']
    assert [item.kind for item in find_items(['0', 'rtsp://host/x'])[0]] == ['camera'] * 2


@pytest.mark.parametrize(('source', 'message'), [
    ('empty', 'holds no picture and no video. It is empty'),
    ('texts', r'holds no picture and no video. It holds other files: a\.doc'),
    ('*.webp', r'pattern \*\.webp fits no picture'), ('absent.jpg', r'There is no absent\.jpg'),
    (' ', 'SOURCE is empty'), ('none.txt', 'list none.txt is empty'),
    ('bytes.txt', 'byte 0 is 0xff'), ('http://', 'no usable host')])
def test_sources_that_lead_to_nothing(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir(), Path('texts').mkdir(), Path('texts/a.doc').touch()
    Path('none.txt').write_text('\n'), Path('bytes.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match=message):
        find_items([source])


@pytest.fixture
def server(tmp_path):
    with served(tmp_path) as address:
        yield address


def test_addresses(server, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'content')
    (tmp_path / 'b.mp4').write_bytes(b'film')
    item = find_items([f'{server}/a.png?key=secret'])[0][0]
    local = fetched(item, tmp_path)
    assert local.kind == 'image' and Path(local.path).read_bytes() == b'content'
    assert 'secret' not in str(item) and local.name == 'a.png'
    assert fetched(Item(f'{server}/b.mp4', 'b.mp4', 'address'), tmp_path).kind == 'video'
    for name, message in (('none.png', 'answered 404.*Check the address'),
                          ('short.png', 'ended')):
        with pytest.raises(UserError, match=message):
            fetched(Item(f'{server}/{name}', name, 'address'), tmp_path)


def film(path, count=6, size=(48, 64)):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, size[::-1])
    for number in range(count):
        video.write(np.full((*size, 3), 40 * number, np.uint8))
    video.release()
    return path


def test_videos(tmp_path):
    frames = Frames(Item(str(film(tmp_path / 'a.avi')), 'a.avi', 'video'))
    assert (frames.rate, frames.count) == (12, 6)
    assert [int(image.mean().round()) // 40 for image in frames] == [0, 1, 2, 3, 4, 5]
    assert frames.problem() is None
    frames.count = 20
    assert 'ends after 6 of 20 pictures; it is cut off' in frames.problem()
    (tmp_path / 'b.mp4').write_bytes(b'no video at all')
    with pytest.raises(UserError, match=r'b\.mp4 cannot be opened\. The file is damaged'):
        Frames(Item(str(tmp_path / 'b.mp4'), 'b.mp4', 'video'))


# --- files ----------------------------------------------------------------------------------------

MASK = np.zeros((40, 50), bool)
MASK[10:20, 5:25] = True
IMAGE = np.full((40, 50, 3), 90, np.uint8)


def one(masks):
    return made([(np.array([5, 10, 25, 20]), 1, 0.75)], (40, 50),
                [encoded(MASK)] if masks else None)


def results(tmp_path, *kinds):
    return Results(tmp_path / 'out', kinds, NAMES)


def test_names_of_files_do_not_meet(tmp_path):
    stem = results(tmp_path).stem
    assert [stem(name) for name in ('a.png', 'A.jpg', 'a.bmp', 'sub/a.png', '../up.png', 'a.png')
            ] == ['a', 'A_jpg', 'a_bmp', 'sub/a', 'up', 'a_png']


@pytest.mark.parametrize('masks', [True, False])
def test_labels_for_annotation_tools(tmp_path, masks):
    out = results(tmp_path, 'yolo', 'labelme')
    out.add('sub/a.png', 'sub/a', one(masks), IMAGE, source=str(tmp_path / 'in' / 'a.png'))
    out.add('b.png', 'b', made([], (40, 50), None), IMAGE)
    out.close()
    folder = tmp_path / 'out'
    label, *values = (folder / 'labels/sub/a.txt').read_text().split()
    values = np.array(values, float)
    if masks:
        points = values.reshape(-1, 2) * (50, 40)
        np.testing.assert_allclose([*points.min(axis=0), *points.max(axis=0)], [5, 10, 25, 20],
                                   atol=0.2)
    else:
        assert values.tolist() == [0.3, 0.375, 0.4, 0.25]
    assert label == '1' and (folder / 'labels/b.txt').read_text() == ''
    assert '  1: "b"\n' in (folder / 'data.yaml').read_text()
    found = json.loads((folder / 'labelme/sub/a.json').read_text())
    assert found['imagePath'] == '../../../in/a.png' and found['imageHeight'] == 40
    (shape,) = found['shapes']
    assert shape['label'] == 'b' and shape['shape_type'] == ('polygon' if masks else 'rectangle')
    assert (shape['points'] == [[5, 10], [25, 20]]) != masks
    assert json.loads((folder / 'labelme/b.json').read_text())['shapes'] == []


def test_the_json_is_a_coco_file(tmp_path):
    out = results(tmp_path)
    for name in ('a.png', 'ä.png'):
        out.add(name, out.stem(name), one(True), IMAGE)
    out.close()
    found = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [each['file_name'] for each in found['images']] == ['a.png', 'ä.png']
    assert found['images'][1] == dict(id=2, file_name='ä.png', width=50, height=40)
    assert [(each['id'], each['image_id'], each['category_id']) for each in found['annotations']
            ] == [(1, 1, 2), (2, 2, 2)]
    assert found['categories'][1] == dict(id=2, name='b')


def test_regions_as_labels(tmp_path):
    labels = np.full((40, 50), 255, np.uint8)
    labels[MASK], labels[30:35, :10], labels[30:35, 20:30] = 1, 2, 2
    out = results(tmp_path, 'masks', 'yolo', 'labelme', 'pictures')
    out.add('a.png', 'a', Segmentation('a', labels, NAMES, ((1, 1, 1),) * 3), IMAGE)
    out.close()
    lines = (tmp_path / 'out/labels/a.txt').read_text().splitlines()
    assert [line.split()[0] for line in lines] == ['1', '2', '2']
    shapes = json.loads((tmp_path / 'out/labelme/a.json').read_text())['shapes']
    assert [each['group_id'] for each in shapes] == [None, 1, 1]
    with Image.open(tmp_path / 'out/masks/a.png') as image:
        assert np.array_equal(np.asarray(image), labels)
    assert (tmp_path / 'out/pictures/a.jpg').is_file()


@pytest.mark.parametrize(('code', 'advice'), [
    (errno.ENOSPC, 'Free some space'), (errno.EACCES, 'Correct its permissions')])
def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch, code, advice):
    out = results(tmp_path, 'pictures')
    out.add('a.png', 'a', one(True), IMAGE)
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(NotWritten, match=rf'b\.jpg could not be written: {os.strerror(code)}. '
                                         rf'{advice}'):
        out.add('b.png', 'b', one(True), IMAGE)
    assert os.listdir(tmp_path / 'out/pictures') == ['a.jpg']
    monkeypatch.undo()
    out.close()  # what was done is kept
    assert len(json.loads((tmp_path / 'out/predictions.json').read_text())['images']) == 1


def test_a_film(tmp_path):
    out = results(tmp_path, 'pictures')
    for number in range(5):
        out.add(f'v/{number}.jpg', f'v/{number}', one(True), IMAGE[:39, :49], film=('v', 12.))
    out.end_film('v')
    frames = Frames(Item(str(tmp_path / 'out/videos/v.mp4'), 'v.mp4', 'video'))
    assert frames.rate == 12
    assert [image.shape for image in frames] == [(38, 48, 3)] * 5  # the codec has even sides alone


def test_a_film_that_the_disk_has_cut(tmp_path):
    out = results(tmp_path, 'pictures')
    out.add('v/0.jpg', 'v/0', one(True), IMAGE, film=('v', 12.))
    out._films['v'].written = 9
    with pytest.raises(NotWritten, match=r'v\.mp4 could not be written whole \(1 of 9 pictures\)'):
        out.close()
    assert (tmp_path / 'out/predictions.json').is_file()


def test_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_folder('x')) for _ in range(3)] == ['x', 'x-2', 'x-3']
    (tmp_path / 'file').touch()
    with pytest.raises(NotWritten, match='y could not be written: Not a directory'):
        new_folder('file/y')


def test_results_do_not_replace_pictures(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'pictures')
    items = [Item(str(tmp_path / 'link' / 'a.jpg'), 'a.jpg', 'image')]
    with pytest.raises(UserError, match=r'a\.jpg lies where --out .* would write'):
        check_apart(tmp_path, items)
    check_apart(tmp_path / 'out', items)
    check_apart(tmp_path, [Item('0', 'camera0', 'camera'),
                           Item(str(tmp_path / 'a.jpg'), 'a.jpg', 'image')])
