"""Every form of export becomes the same boxes, outlines, label images and splits."""
import json
import shutil

import exports
import numpy as np
import pytest
from PIL import Image

from mmhybrid.datasets.exports import ExportError, Questions, read_export
from mmhybrid.datasets.exports.preparing import label_image, prepare, thing_mask, write

SCENES = exports.scenes(6)
BOXES = {name: sorted((label, *map(round, box)) for label, box, _ in things)
         for name, _, things in SCENES}


def read(folder, task=None, yes=True, **given):
    questions = Questions(given, yes)
    export = read_export(str(folder), questions, task)
    return prepare(export, questions, task, 0.3, 0), questions


def pictures(prepared):
    return {one.name.rpartition('/')[2].partition('.')[0].partition('-')[2]
            or one.name.rpartition('/')[2].partition('.')[0]: one
            for found in prepared.splits.values() for one in found}


def labels_of(name):
    pixels, things = next(scene[1:] for scene in SCENES if scene[0] == name)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for label, _, outlines in things:
        labels[exports.mask_of(outlines, pixels.shape)] = 1 + exports.NAMES.index(label)
    return labels


INSTANCES = {
    'yolo': (exports.yolo, {}, 'detect'),
    'yolo outlines': (exports.yolo, dict(outlines=True), 'instance'),
    'yolo split': (exports.yolo, dict(split=True), 'detect'),
    'coco': (exports.coco, {}, 'instance'),
    'coco boxes': (exports.coco, dict(kind='boxes'), 'detect'),
    'cvat brush': (exports.coco, dict(kind='cvat'), 'instance'),
    'label studio': (exports.coco, dict(kind='studio'), 'instance'),
    'roboflow': (exports.coco, dict(kind='roboflow'), 'instance'),
    'voc': (exports.voc, {}, 'detect'),
    'labelme': (exports.labelme, {}, 'instance'),
}


@pytest.mark.parametrize('form', INSTANCES)
def test_boxes_and_outlines_are_those_of_the_scenes(form, tmp_path):
    make, options, task = INSTANCES[form]
    prepared, _ = read(make(tmp_path, **options))
    assert prepared.task == task
    assert sorted(prepared.classes) == sorted(exports.NAMES)
    found = pictures(prepared)
    assert set(found) == set(BOXES)
    for name, one in found.items():
        things = [thing for thing in one.things if not thing.crowd]
        assert len(things) == len(one.things)
        boxes = sorted((thing.label, *map(round, thing.box)) for thing in things)
        assert [box[0] for box in boxes] == [box[0] for box in BOXES[name]]
        if form != 'yolo outlines':  # which keep one part of several
            assert np.abs(np.array([box[1:] for box in boxes])
                          - np.array([box[1:] for box in BOXES[name]])).max() <= 1
        if task == 'instance' and form != 'yolo outlines':
            masks = np.zeros(one.size[::-1], bool)
            for thing in things:
                masks |= thing_mask(thing, one.size)
            assert np.mean(masks != (labels_of(name) > 0)) < 0.01
    parts = form in ('yolo split', 'roboflow', 'voc')
    assert {split: len(p) for split, p in prepared.splits.items()} == {'train': 4, 'val': 2}
    if parts:
        assert {name for name in found if found[name] in prepared.splits['val']} == {
            'scene_002', 'scene_005'}


@pytest.mark.parametrize('kind', ['index', 'palette', 'colours', 'labelmap', 'binary'])
def test_label_images_become_class_numbers(kind, tmp_path):
    folder = exports.masks(tmp_path / 'data', kind=kind)
    names = {} if kind == 'labelmap' else dict(
        classes='ground,thing' if kind == 'binary' else ','.join(['ground', *exports.NAMES]))
    prepared, _ = read(folder, yes=False, **names)
    assert prepared.task == 'semantic'
    assert len(prepared.classes) == (2 if kind == 'binary' else 6)
    found = pictures(prepared)
    assert set(found) == set(BOXES)
    for name, one in found.items():
        expected = labels_of(name)
        if kind == 'binary':
            expected = (expected > 0).astype(np.uint8)
        elif kind == 'colours':  # numbered by colour
            order = sorted(exports.COLOURS)
            expected = np.array([order.index(colour) for colour in exports.COLOURS])[expected]
        assert np.array_equal(label_image(prepared, one), expected)
    write(prepared, tmp_path)
    listed = (tmp_path / 'train.txt').read_text().splitlines()
    assert all((folder / name).is_file() for name in listed)
    with Image.open(tmp_path / 'labels' / f'{listed[0]}.png') as image:
        assert image.mode == 'L'


def test_outlines_become_label_images_too(tmp_path):
    prepared, _ = read(exports.coco(tmp_path), 'semantic')
    assert prepared.classes == ['background', *exports.NAMES]
    for name, one in pictures(prepared).items():
        assert np.mean(label_image(prepared, one) != labels_of(name)) < 0.02


def test_written_annotations_pass_the_check_before_training(tmp_path):
    from mmhybrid.datasets.annotations import check_coco
    from mmhybrid.datasets.coco_records import load_records
    for kind in ('plain', 'cvat'):
        prepared, _ = read(exports.coco(tmp_path / kind, kind=kind))
        out = tmp_path / f'{kind}_out'
        out.mkdir()
        write(prepared, out)
        records, problems = load_records(str(out / 'train.json'))
        assert not problems
        problems, notes, summary = check_coco(records, tuple(prepared.classes), True, True, True,
                                              str(tmp_path / kind))
        assert not problems and not notes, (problems, notes)


# --- questions ------------------------------------------------------------------------------------

def refused(folder, *parts, task=None, **given):
    with pytest.raises(ExportError) as error:
        read(folder, task, False, **given)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_what_is_open_is_named_with_its_option(tmp_path):
    refused(exports.coco(tmp_path / 'cvat', kind='cvat'), '20 of 20', 'iscrowd=1', '--crowd')
    refused(exports.masks(tmp_path / 'binary', kind='binary'), '0 (', '255 (', '--classes')
    refused(exports.masks(tmp_path / 'rgb', kind='colours'), '60/205/30', '--classes')
    both = exports.voc(exports.yolo(tmp_path / 'both'))
    refused(both, 'several forms', 'yolo', 'voc', '--format')
    assert read(both, yes=False, format='voc')[0].export.form == 'voc'
    mixed = exports.yolo(tmp_path / 'mixed', outlines=True)
    path = mixed / 'labels/scene_000.txt'
    path.write_text(path.read_text() + '1 0.5 0.5 0.25 0.25\n')
    refused(mixed, '--task', 'only a box')
    assert read(mixed, 'instance', False)[0].export.notes == [
        '1 x box without an outline: its rectangle is the outline']


def test_a_person_is_asked_and_told(tmp_path):
    asked = []

    def ask(text):
        asked.append(text)
        return 'objects'

    questions = Questions({}, False, ask)
    export = read_export(str(exports.coco(tmp_path, kind='cvat')), questions)
    assert len(asked) == 1 and 'CVAT' in asked[0] and '[objects]' in asked[0]
    assert not any(thing.crowd for one in export.pictures for thing in one.things)
    assert questions.told[0].endswith('Answered: --crowd objects')


def test_a_few_crowds_stay_crowds_unasked(tmp_path):
    folder = exports.coco(tmp_path)
    path = folder / 'annotations/instances_default.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['iscrowd'] = 1
    path.write_text(json.dumps(content))
    prepared, _ = read(folder, yes=False)
    assert sum(thing.crowd for p in prepared.splits.values() for one in p
               for thing in one.things) == 1


def test_yolo_without_names_asks_for_them(tmp_path):
    folder = exports.yolo(tmp_path)
    (folder / 'data.yaml').unlink()
    refused(folder, 'names of its 5 classes', '--classes')
    (folder / 'classes.txt').write_text('a\nb\nc\nd\ne\n')
    assert read(folder, yes=False)[0].classes == [*'abcde']


def test_255_beside_class_numbers_is_left_out_and_said(tmp_path):
    folder = exports.masks(tmp_path)
    for path in folder.rglob('masks/**/*.png'):
        labels = np.asarray(Image.open(path)).copy()
        labels[:4] = 255
        Image.fromarray(labels).save(path)
    prepared, _ = read(folder, yes=False, classes=','.join(['ground', *exports.NAMES]))
    assert any('255' in note for note in prepared.export.notes)
    one = prepared.splits['train'][0]
    assert (label_image(prepared, one)[:4] == 255).all()


# --- faults ---------------------------------------------------------------------------------------

def test_no_data_is_named(tmp_path):
    refused(tmp_path / 'absent', 'does not exist')
    refused(tmp_path, 'holds no images')
    exports.save(np.zeros((8, 8, 3), np.uint8), tmp_path / 'a.png')
    refused(tmp_path, 'no annotations of a known form', 'YOLO')
    refused(tmp_path / 'a.png', 'is a file')


@pytest.mark.parametrize(('line', 'parts'), [
    ('9 0.5 0.5 0.1 0.1', ('line 1', 'class 9', 'there are 5')),
    ('0 80 60 20 20', ('line 1', 'pixels', '0 to 1')),
])
def test_a_wrong_line_of_yolo_is_named(line, parts, tmp_path):
    folder = exports.yolo(tmp_path)
    (folder / 'labels/scene_000.txt').write_text(f'{line}\n')
    refused(folder, 'scene_000.txt', *parts)


def test_what_is_left_out_is_counted(tmp_path):
    folder = exports.coco(tmp_path)
    path = folder / 'annotations/instances_default.json'
    content = json.loads(path.read_text())
    content['images'][1]['width'] += 10
    content['annotations'][0]['bbox'] = [500, 500, 20, 20]
    content['annotations'][1]['category_id'] = 77
    path.write_text(json.dumps(content))
    (folder / 'images/scene_003.jpg').write_bytes(b'no picture')
    (folder / 'images/scene_004.jpg').unlink()
    notes = ' | '.join(read(folder, yes=False)[0].export.notes)
    for part in ('2 x image that is not there or cannot be read', '1 x image whose size is another',
                 'box has no area inside its picture', 'a category that is not there'):
        assert part in notes, notes


def test_hostile_xml_and_json_are_refused(tmp_path):
    folder = exports.voc(tmp_path / 'voc')
    path = folder / 'Annotations/scene_000.xml'
    path.write_text('<!DOCTYPE x [<!ENTITY a "aaaa">]>' + path.read_text())
    refused(folder, 'scene_000.xml', 'document type')
    path.write_text('<annotation><object>')
    refused(folder, 'scene_000.xml', 'not valid XML')
    folder = exports.labelme(tmp_path / 'labelme')
    (folder / 'day/scene_001.json').write_text('{"shapes": [')
    refused(folder, 'scene_001.json', 'not valid JSON')
    folder = exports.yolo(tmp_path / 'yolo')
    (folder / 'data.yaml').write_text('names: !!python/object/apply:os.system ["true"]')
    refused(folder, 'data.yaml', 'YAML')


def test_two_pictures_of_one_name_are_told_apart_by_folder(tmp_path):
    folder = exports.labelme(tmp_path)
    shutil.copytree(folder / 'day', folder / 'second')
    export = read_export(str(folder), Questions())
    assert len(export.pictures) == 9
    content = json.loads((folder / 'day/scene_001.json').read_text())
    (folder / 'third').mkdir()
    (folder / 'third/x.json').write_text(json.dumps(content))
    refused(folder, 'x.json', 'could be', 'second/scene_001.jpg')


def test_exif_turned_pictures_have_the_size_that_is_shown(tmp_path):
    folder = exports.yolo(tmp_path)
    name, size = next((name, pixels.shape[1::-1]) for name, pixels, _ in SCENES
                      if pixels.shape[0] != pixels.shape[1])
    path = folder / f'images/{name}.jpg'
    with Image.open(path) as image:
        exif = image.getexif()
        exif[274] = 6
        image.save(path, exif=exif)
    one = pictures(read(folder)[0])[name]
    assert one.size == size[::-1]


# --- splits ---------------------------------------------------------------------------------------

def test_the_split_keeps_classes_and_depends_on_the_seed(tmp_path):
    folder = exports.yolo(tmp_path, 40)
    one, two, other = (prepare(read_export(str(folder), Questions()), Questions(), None, 0.25, seed)
                       for seed in (0, 0, 1))
    names = [[p.name for p in prepared.splits['val']] for prepared in (one, two, other)]
    assert names[0] == names[1] != names[2]
    assert 8 <= len(names[0]) <= 12
    for name in exports.NAMES:
        counts = [sum(any(t.label == name for t in p.things) for p in one.splits[split])
                  for split in ('train', 'val')]
        assert 0.15 < counts[1] / sum(counts) < 0.35


def test_copies_and_groups_stay_together(tmp_path):
    folder = exports.yolo(tmp_path, 12)
    for index in range(0, 12, 2):
        shutil.copy(folder / f'images/scene_{index:03d}.jpg', folder / f'images/copy_{index}.jpg')
        shutil.copy(folder / f'labels/scene_{index:03d}.txt', folder / f'labels/copy_{index}.txt')
    prepared, _ = read(folder)
    where = {p.name: split for split, found in prepared.splits.items() for p in found}
    for index in range(0, 12, 2):
        assert where[f'images/scene_{index:03d}.jpg'] == where[f'images/copy_{index}.jpg']
    assert sum('the same file' in text for text in prepared.suspicious) == 6
    frames = exports.yolo(tmp_path / 'frames', 12)
    prepared, _ = read(frames, group=r'scene_0\d')
    assert [p.name for p in prepared.splits['val']] == [f'images/scene_{n:03d}.jpg'
                                                        for n in (10, 11)]
    refused(folder, 'finds nothing', group='video')
    refused(folder, 'not a regular expression', group='(')


def test_pictures_for_testing_need_annotations(tmp_path):
    folder = exports.yolo(tmp_path, 9, split=True)
    (folder / 'valid').rename(folder / 'test')
    prepared, _ = read(folder)
    assert {split: len(found) for split, found in prepared.splits.items()} == {
        'train': 4, 'val': 2, 'test': 3}
    shutil.rmtree(folder / 'test/labels')
    prepared, questions = read(folder)
    assert set(prepared.splits) == {'train', 'val'}
    assert any('3 pictures for testing have no annotations' in text for text in questions.told)


def test_a_class_of_one_picture_is_trained_on(tmp_path):
    folder = exports.yolo(tmp_path, 10)
    (folder / 'data.yaml').write_text((folder / 'data.yaml').read_text().replace(
        'train: images', '  5: rare'))
    (folder / 'labels/scene_007.txt').write_text('5 0.5 0.5 0.2 0.2\n')
    for seed in range(5):
        prepared = prepare(read_export(str(folder), Questions()), Questions(), None, 0.3, seed)
        assert 'images/scene_007.jpg' in [p.name for p in prepared.splits['train']]


def test_suspicious_annotations_are_said_and_kept(tmp_path):
    folder = exports.yolo(tmp_path)
    path = folder / 'labels/scene_000.txt'
    path.write_text(path.read_text() + '0 0.5 0.5 0.01 0.01\n1 0.5 0.5 0.3 0.3\n1 0.5 0.5 0.3 0.3\n'
                    '2 0.0 0.5 0.4 0.2\n')
    (folder / 'data.yaml').write_text('names: [frisbee, zebra, Zebra, kite, pizza]\n')
    said = ' | '.join(read(folder)[0].suspicious)
    for part in ('a side of less than 4', 'nearly equal boxes', 'reach out of their picture',
                 'zebra, Zebra differ only', 'fewer than 5 objects'):
        assert part in said, said


def test_broken_outlines_are_left_out_with_the_reason(tmp_path):
    folder = exports.coco(tmp_path)
    path = folder / 'annotations/instances_default.json'
    content = json.loads(path.read_text())
    faults = [dict(counts='garbage\x01', size=[160, 160]), dict(counts=[5, 7], size=[160, 160]),
              dict(counts=[5, 25595], size=[160, 160]), [[1, 2, 3, 'x', 5, 6]],
              [[1, 2, float('nan'), 4, 5, 60]]]
    places = [place for place, entry in enumerate(content['annotations']) if [
        content['images'][entry['image_id']][key] for key in ('width', 'height')] == [160, 160]]
    for place, fault in zip(places, faults, strict=False):
        content['annotations'][place]['segmentation'] = fault
    path.write_text(json.dumps(content))
    prepared, _ = read(folder, 'instance', yes=False)
    notes = ' | '.join(prepared.export.notes)
    assert notes.count('whose outline cannot be used') == 3, notes
    assert '1 x box without an outline' in notes


def test_names_are_compared_without_case_and_spelling_of_accents(tmp_path):
    folder = exports.coco(tmp_path)
    path = folder / 'annotations/instances_default.json'
    (folder / 'images/scene_001.jpg').rename(folder / 'images/Me\u0301XICO.JPG')
    path.write_text(path.read_text().replace('scene_001.jpg', 'm\u00e9xico.jpg'))
    assert len(read_export(str(folder), Questions()).pictures) == 6


@pytest.mark.parametrize('name', [b'a\xff.jpg', b'a\nb.jpg'])
def test_names_that_no_list_can_hold_are_named(name, tmp_path):
    folder = exports.yolo(tmp_path)
    with open(bytes(folder) + b'/images/' + name, 'wb'):
        pass
    refused(folder, 'line break or is not UTF-8')


def test_texts_in_another_encoding_are_named(tmp_path):
    folder = exports.yolo(tmp_path)
    (folder / 'data.yaml').unlink()
    (folder / 'classes.txt').write_bytes('Käfer\nb\nc\nd\ne\n'.encode('cp1252'))
    refused(folder, 'classes.txt', 'UTF-8', '0xe4')
