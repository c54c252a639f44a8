"""Label images and folders of one's own that are odd, wrong or hostile."""
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmhybrid.datasets.label_images import check_label_images, label_problem, pair_files
from mmhybrid.datasets.label_mapping import map_labels, parse_mapping
from mmhybrid.datasets.loading.checks import check_classes
from mmhybrid.datasets.loading.pipeline_guard import guard_image_files
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.errors import UserError
from mmhybrid.registry import TRANSFORMS  # noqa: F401  registers

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (6, 8)


@pytest.fixture(autouse=True)
def _mmseg(monkeypatch):
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    monkeypatch.setattr('mmhybrid.datasets.loading.pipeline_guard._expected', {})
    guard_image_files()
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)


def grey(*values, shape=SHAPE, dtype=np.uint8):
    labels = np.zeros(shape, dtype)
    labels.flat[:len(values)] = values
    return labels


def folders(root, labels, images=None, suffix='.png'):
    """Write a set: label images by stem (an array or a PIL image), and pictures of their size."""
    for name in ('images', 'labels'):
        (root / name).mkdir(parents=True)
    for stem, values in labels.items():
        picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
        picture.save(root / 'labels' / f'{stem}{suffix}')
        Image.new('RGB', picture.size, (9, 99, 9)).save(root / 'images' / f'{stem}.jpg')
    return root


def config(root, classes=('no', 'yes'), steps=(), **settings):
    dataset = dict(
        type='BaseSegDataset', data_root=str(root), metainfo=dict(classes=classes),
        data_prefix=dict(img_path='images', seg_map_path='labels'), **settings,
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *steps,
                  dict(type='PackSegInputs')])
    return Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=dataset),
                       model=dict(decode_head=dict(num_classes=len(classes)))))


def checked(cfg):
    """Warnings, the summary, and the data set that is trained on."""
    facts = []
    notes = check_classes(cfg, ['train'], facts)
    (fact,) = facts
    return notes, fact, DATASETS.build(cfg.train_dataloader.dataset)


def refusal(cfg):
    with pytest.raises(UserError) as error:
        check_classes(cfg, ['train'])
    return str(error.value)


def loaded(dataset, index=0):
    return dataset[index]['data_samples'].gt_sem_seg.data[0].numpy()


# --- what a label image may look like ---------------------------------------------------------

def picture(mode, values=(0, 1, 1, 255)):
    labels = grey(*values)
    if mode == 'P':
        image = Image.fromarray(labels).convert('P')
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
        image.putdata(labels.ravel().tolist())
        return image
    if mode == '1':
        return Image.fromarray(labels == 1)
    kinds = {'L': np.uint8, 'I;16': np.uint16, 'I': np.int32, 'F': np.float32}
    return Image.fromarray(labels.astype(kinds[mode]))


@pytest.mark.parametrize('mode, suffix', [
    ('L', '.png'), ('P', '.png'), ('1', '.png'), ('I;16', '.png'), ('I', '.tif'), ('F', '.tif'),
    ('L', '.bmp'), ('P', '.bmp')])
def test_forms_of_one_channel(tmp_path, mode, suffix):
    folders(tmp_path, dict(a=picture(mode), b=grey(1)), suffix=suffix)
    notes, _, dataset = checked(config(tmp_path, seg_map_suffix=suffix))
    assert notes == []
    expected = grey(0, 1, 1, 0 if mode == '1' else 255)
    assert np.array_equal(loaded(dataset), expected)


@pytest.mark.parametrize('mode, words', [
    ('RGB', 'is a colour picture'), ('RGBA', 'colour picture with an alpha channel'),
    ('LA', 'has an alpha channel'), ('CMYK', 'CMYK')])
def test_forms_of_more_channels(tmp_path, mode, words):
    folders(tmp_path, dict(a=Image.new(mode, SHAPE[::-1])), suffix='.tif')
    text = refusal(config(tmp_path, seg_map_suffix='.tif'))
    assert str(tmp_path / 'labels' / 'a.tif') in text and words in text
    assert 'class numbers' in text and 'python tools/map_labels.py' in text


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1)])
def test_one_pixel_high(tmp_path, shape):
    folders(tmp_path, dict(a=grey(1, shape=shape)))
    notes, _, dataset = checked(config(tmp_path))
    assert notes == []
    assert np.array_equal(loaded(dataset), grey(1, shape=shape))


@pytest.mark.parametrize('array, problem', [
    (grey(1), None), (grey(1)[..., None], None), (grey(1, 255), None),
    (grey(-1, 1, dtype=np.int32), None), (grey(1, 1, dtype=bool), None),
    (grey(2), 'label 2'), (grey(300, dtype=np.uint16), 'label 300'),
    (grey(256, dtype=np.uint16), 'label 256'), (grey(65535, dtype=np.uint16), 'label 65535'),
    (grey(-2, dtype=np.int32), 'label -2'), (grey(0.5, dtype=np.float32), 'label 0.5'),
    (grey(np.nan, dtype=np.float32), 'label nan'), (grey(np.inf, dtype=np.float32), 'label inf'),
    (np.stack([grey(1)] * 2, -1), 'alpha'), (grey(1, shape=(8, 6)), 'is 6 x 8, its image 8 x 6'),
])
def test_values_and_shapes(array, problem):
    text = label_problem(array, SHAPE, 'x.png', 2)
    assert text is None if problem is None else problem in text and text.startswith('x.png')


def test_the_largest_number_of_classes():
    everything = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert label_problem(everything, (16, 16), 'x.png', 255) is None
    assert 'label 254 ' not in label_problem(everything, (16, 16), 'x.png', 200)
    assert '(1 of 256 pixels' in label_problem(everything, (16, 16), 'x.png', 254)
    assert label_problem(everything, (16, 16), 'x.png', 254, zero=True) is None
    assert 'has label 255' in label_problem(everything, (16, 16), 'x.png', 254, ignored=254)


# --- a wrong label that the sample before training does not meet -------------------------------

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('wrong, value', [
    (grey(0, 7, 7), 7), (grey(256, dtype=np.uint16), 256)], ids=['8 bits', '16 bits'])
def test_a_bad_label_outside_the_sample(tmp_path, workers, wrong, value):
    from torch.utils.data import DataLoader
    labels = {f'{index:03}': grey(1) for index in range(60)}
    labels['031'] = wrong
    folders(tmp_path, labels)
    _, _, dataset = checked(config(tmp_path))
    loader = DataLoader(dataset, num_workers=workers, collate_fn=list, batch_size=4)
    with pytest.raises(UserError if not workers else Exception) as error:
        list(loader)
    from mmhybrid.engine.explanations import explain
    text = explain(error.value)
    assert text.startswith(f'{tmp_path}/labels/031.png has label {value}, but with 2 classes')
    assert f'({int((wrong > 1).sum())} of 48 pixels' in text and 'Traceback' not in text


def test_classes_chosen_and_numbered_anew_pass(tmp_path):
    """150 classes in the files, two of them wanted: the rest is "ignore" after loading."""
    write_mini_ade20k(tmp_path / 'ade', train=4, val=2)
    cfg = Config(dict(
        default_scope='mmseg', model=dict(decode_head=dict(num_classes=2)),
        train_dataloader=dict(dataset=dict(
            type='ADE20KDataset', data_root=str(tmp_path / 'ade'),
            metainfo=dict(classes=('sky', 'wall')),
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
                      dict(type='PackSegInputs')]))))
    notes, fact, dataset = checked(cfg)
    assert notes == [] and 'none is left out' in fact and len(dataset) == 4
    assert set().union(*(np.unique(loaded(dataset, index)) for index in range(4))) <= {0, 1, 255}
    Image.fromarray(np.full((5, 5), 151, np.uint8)).save(
        next((tmp_path / 'ade/annotations/training').iterdir()))
    with pytest.raises(UserError, match='both must have the same size'):
        [dataset[index] for index in range(4)]


def test_two_data_sets_of_one_folder(tmp_path):
    folders(tmp_path, dict(a=grey(1), b=grey(2)))
    cfg = config(tmp_path, classes=('x', 'y', 'z'))
    check_classes(cfg, ['train'])
    narrow = dict(cfg.train_dataloader.dataset, metainfo=dict(classes=('x', 'y')), indices=1)
    DATASETS.build(narrow)[0]
    assert len(DATASETS.build(cfg.train_dataloader.dataset)[1]) == 2


# --- 0/255 -------------------------------------------------------------------------------------

def test_masks_of_0_and_255(tmp_path):
    """Refused, and the command in the message makes them right."""
    folders(tmp_path, dict(a=grey(255, 255), b=grey(255), c=grey()))
    text = refusal(config(tmp_path))
    assert f'All 3 label images of {tmp_path}/labels hold only 0 and 255' in text
    command = next(line for line in text.splitlines() if 'map_labels.py' in line).strip()
    python, tool, *args = shlex.split(command)
    assert python == 'python' and args[2:] == ['0=0', '255=1']
    run_tool(tool, args)
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset.data_prefix.seg_map_path = Path(args[1]).name
    notes, _, dataset = checked(cfg)
    assert notes == [] and np.array_equal(loaded(dataset), grey(1, 1))


def run_tool(tool, args):
    done = subprocess.run([sys.executable, ROOT / tool, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_ignored_with_reduce_zero_label(tmp_path):
    folders(tmp_path, dict(a=grey(255), b=grey()))
    assert 'reduce_zero_label=True; set that to False' in refusal(
        config(tmp_path, reduce_zero_label=True))


def test_ignore_with_a_rare_class_passes(tmp_path):
    """One label in one of many files shows that 255 does mean "ignore"."""
    labels = {f'{index:03}': grey(255) for index in range(70)}
    labels['040'] = grey(255, 0, 1)
    folders(tmp_path, labels)
    notes, _, dataset = checked(config(tmp_path))
    assert notes == [] and len(dataset) == 70


def test_what_is_not_trained_on_is_only_noted(tmp_path):
    folders(tmp_path, dict(a=grey(255)))
    paths = [(f'{tmp_path}/images/a.jpg', f'{tmp_path}/labels/a.png')]
    assert check_label_images(paths, f'{tmp_path}/labels', 2, train=True)[0]
    problems, notes = check_label_images(paths, f'{tmp_path}/labels', 2)
    assert not problems and 'only 0 beside 255' in notes[0]
    assert check_label_images(paths, f'{tmp_path}/labels', 1, train=True) == ([], [])


@pytest.mark.parametrize('labels', [
    dict(a=grey()), dict(a=grey(1)), dict(a=grey(1, 255), b=grey()), dict(a=grey(255, 255, 1))])
def test_few_images_pass(tmp_path, labels):
    folders(tmp_path, labels)
    assert not check_classes(config(tmp_path), ['train']) or 255 in labels['a']


def test_jpeg_masks(tmp_path):
    soft = Image.fromarray(np.kron(grey(0, 255, 255, 0, 255), np.ones((5, 5), np.uint8)))
    folders(tmp_path / 'grey', dict(a=soft), suffix='.jpg')
    text = refusal(config(tmp_path / 'grey', seg_map_suffix='.jpg'))
    assert 'a.jpg has label ' in text and 'map_labels.py' in text and 'JPEG changes values' in text
    source, target = tmp_path / 'grey/labels', tmp_path / 'numbered'
    assert map_labels(str(source), str(target), {0: 0, 255: 1}) == 1
    assert np.array_equal(np.asarray(Image.open(target / 'a.png')), np.asarray(soft) // 255)
    folders(tmp_path / 'flat', dict(a=grey()), suffix='.jpg')
    notes, _, _ = checked(config(tmp_path / 'flat', seg_map_suffix='.jpg'))
    assert len(notes) == 1 and 'a.jpg is a JPEG' in notes[0] and 'PNG' in notes[0]


def test_gif_masks(tmp_path):
    folders(tmp_path / 'two', dict(a=grey(1)), suffix='.gif')
    notes, _, dataset = checked(config(tmp_path / 'two', seg_map_suffix='.gif'))
    assert len(notes) == 1 and 'a.gif is a GIF' in notes[0]
    assert np.array_equal(loaded(dataset), grey(1))
    # 0, 1 and 255 become the indices 0, 1 and 2.
    source = folders(tmp_path / 'three', dict(a=grey(1, 255)), suffix='.gif') / 'labels'
    text = refusal(config(tmp_path / 'three', seg_map_suffix='.gif'))
    assert 'a.gif has label 2' in text and 'name its colours there' in text
    map_labels(str(source), str(tmp_path / 'out'), parse_mapping(
        ['0,0,0=0', '1,1,1=1', '255,255,255=255']))
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out/a.png')), grey(1, 255))


def test_animated_masks(tmp_path):
    folders(tmp_path, dict(a=grey(1)))
    frames = [Image.fromarray(grey(*values)) for values in ((1,), (0, 1), (0, 0, 1))]
    frames[0].save(tmp_path / 'labels/a.gif', save_all=True, append_images=frames[1:])
    notes, _, dataset = checked(config(tmp_path, seg_map_suffix='.gif'))
    assert len(notes) == 1 and 'its first picture is taken' in notes[0]
    assert np.array_equal(loaded(dataset), grey(1))


# --- what is used and what is left out ---------------------------------------------------------

def touch(path, like):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(like.read_bytes())


def test_mixed_suffixes_are_counted(tmp_path):
    folders(tmp_path, dict(a=grey(1), b=grey(), c=grey(), d=grey()))
    images = tmp_path / 'images'
    (images / 'b.jpg').rename(images / 'b.JPG')
    (images / 'c.jpg').rename(images / 'c.jpeg')
    for name in ('Thumbs.db', '._a.jpg', '.DS_Store', 'notes.txt', 'sub/deep/e.jpg'):
        touch(images / name, images / 'a.jpg')
    for name in ('sub/deep/e.png', 'spare.png'):
        touch(tmp_path / 'labels' / name, tmp_path / 'labels/a.png')
    notes, fact, dataset = checked(config(tmp_path))
    assert len(dataset) == 3
    assert fact.startswith(f'The train data: {len(dataset)} images of {images} are used')
    for part in ('1 x .JPG', '1 x .jpeg', '1 x .db', '1 x .txt', "(img_suffix is '.jpg')",
                 '2 hidden (for example .DS_Store)',
                 '3 label images have no image of this suffix (for example b.png)'):
        assert part in fact, part
    (note,) = notes
    assert note.startswith(f'2 of 7 files in {images} are left out though they have a label image')
    assert '1 x .JPG' in note and 'b.JPG' in note and 'Rename them' in note


def test_a_folder_for_both(tmp_path):
    """Names as those of Cityscapes, with images and labels in one folder: nothing is lost."""
    root = folders(tmp_path, {})
    for stem in 'abc':
        for end in ('_leftImg8bit', '_gtFine_labelTrainIds', '_gtFine_color'):
            Image.fromarray(grey(1)).save(root / 'images' / f'{stem}{end}.png')
    cfg = config(root, img_suffix='_leftImg8bit.png', seg_map_suffix='_gtFine_labelTrainIds.png')
    cfg.train_dataloader.dataset.data_prefix.seg_map_path = 'images'
    notes, fact, dataset = checked(cfg)
    assert notes == [] and len(dataset) == 3 and '3 images' in fact and 'left out: 3 x .png' in fact
    (root / 'images/c_leftImg8bit.png').rename(root / 'images/c_leftImg8bit.PNG')
    notes, fact, dataset = checked(cfg)
    assert len(dataset) == 2 and 'c_leftImg8bit.PNG' in notes[0]


@pytest.mark.parametrize('lines, words', [
    ('a\nb\n', None), ('b\r\na', None), ('sub/../a\n', None),
    ('a\n\nb\n', 'Line 2 of {list} is empty'), ('', '{list} is empty'),
    ('a.jpg\n', 'names stand without suffix'),
    ('a\nzzz\n', '1 of 2 names in {list} have no file'), ('A\n', 'A.jpg does not exist'),
    ('\ufeffa\n', 'have no file')])
def test_lists_of_names(tmp_path, lines, words):
    folders(tmp_path, dict(a=grey(1), b=grey(), c=grey()))
    (tmp_path / 'images/sub').mkdir()
    (tmp_path / 'labels/sub').mkdir()
    (tmp_path / 'list.txt').write_text(lines, encoding='utf-8')
    cfg = config(tmp_path, ann_file='list.txt')
    if words is not None:
        assert words.format(list=tmp_path / 'list.txt') in refusal(cfg)
        return
    notes, fact, dataset = checked(cfg)
    assert notes == [] and f'{len(dataset)} images of' in fact and 'list.txt lists them' in fact
    assert f'{3 - len(dataset)} x .jpg ({tmp_path}/list.txt does not list them)' in fact


def test_a_list_that_is_no_text(tmp_path):
    folders(tmp_path, dict(a=grey(1)))
    (tmp_path / 'list.txt').write_bytes(b'a\n\xff\xfe\n')
    assert f'{tmp_path}/list.txt is not text in UTF-8' in refusal(
        config(tmp_path, ann_file='list.txt'))


@pytest.mark.parametrize('there, hint', [
    ('A.png', 'A.png does: names and suffix must agree, in case too'), ('a.PNG', 'a.PNG does'),
    ('a_mask.png', 'a_mask.png does'), ('other.png', 'does not exist. Add them')])
def test_images_without_label(tmp_path, there, hint):
    folders(tmp_path, dict(a=grey(1), b=grey(1)))
    (tmp_path / 'labels/a.png').rename(tmp_path / 'labels' / there)
    text = refusal(config(tmp_path))
    assert '1 of 2 images in' in text and 'labels/a.png does not exist' in text and hint in text


def test_without_label_images(tmp_path):
    """A test set of images alone."""
    folders(tmp_path, dict(a=grey(1), b=grey()))
    cfg = config(tmp_path, test_mode=True)
    cfg.train_dataloader.dataset.data_prefix.pop('seg_map_path')
    notes, fact, dataset = checked(cfg)
    assert notes == [] and f'{len(dataset)} images of' in fact and 'with their' not in fact


def test_indices_are_said(tmp_path):
    folders(tmp_path, dict(a=grey(1), b=grey()))
    assert 'of these indices=1' in checked(config(tmp_path, indices=1))[1]


def test_odd_members_of_a_folder(tmp_path):
    """Pipes, sockets, broken links and folders with the name of an image are not images."""
    folders(tmp_path, dict(a=grey(1), b=grey()))
    images = tmp_path / 'images'
    os.mkfifo(images / 'pipe.jpg')
    (images / 'gone.jpg').symlink_to('nowhere.jpg')
    (images / 'zero.jpg').symlink_to('/dev/zero')
    (images / 'folder.jpg').mkdir()
    here = os.getcwd()
    os.chdir(images)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('socket.jpg')
        os.chdir(here)
        _, fact, dataset = checked(config(tmp_path))
    assert len(dataset) == 2 and '2 images of' in fact
    assert '4 no regular files (for example gone.jpg)' in fact


def test_a_link_to_another_folder_is_followed(tmp_path):
    folders(tmp_path / 'one', dict(a=grey(1)))
    folders(tmp_path / 'two', dict(b=grey(1)))
    for name in ('images', 'labels'):
        (tmp_path / 'one' / name / 'more').symlink_to(tmp_path / 'two' / name)
        (tmp_path / 'one' / name / 'again').symlink_to(tmp_path / 'two' / name)
    _, fact, dataset = checked(config(tmp_path / 'one'))
    assert len(dataset) == 3 and '3 images of' in fact


def test_loops_of_folders(tmp_path):
    folders(tmp_path, dict(a=grey(1)))
    for name in ('left', 'right'):
        (tmp_path / 'images' / name).symlink_to(tmp_path / 'images')
    text = refusal(config(tmp_path))
    assert 'images/left is a link to a folder that it lies in' in text and 'Remove the link' in text


@pytest.mark.parametrize('seed', range(20))
def test_counts_agree_with_the_data_set(tmp_path, seed):
    """Random trees: as many images as BaseSegDataset finds, or a refusal where it would fail."""
    rng = np.random.default_rng(seed)
    folders(tmp_path, {})
    picture, labels = tmp_path / 'p.jpg', tmp_path / 'l.png'
    Image.new('RGB', (8, 6)).save(picture)
    Image.fromarray(grey(1)).save(labels)
    for index in range(int(rng.integers(1, 25))):
        stem = str(rng.choice(['', 'sub/', '.hid/', 'x.jpg/'])) + str(rng.choice(['', '.'])) + (
            f'{index}')
        touch(tmp_path / 'images' / (stem + str(rng.choice(['.jpg', '.JPG', '.png', '', '.txt']))),
              picture)
        touch(tmp_path / 'labels' / (stem + '.png'), labels)
    pairs = pair_files(f'{tmp_path}/images', f'{tmp_path}/labels', '.jpg', '.png')
    dataset = config(tmp_path).train_dataloader.dataset
    if pairs.problems:
        assert pairs.stems == [] and 'has no images that end with' in pairs.problems[0]
        with pytest.raises(ValueError, match='at least one array'):
            DATASETS.build(dataset)
    else:
        assert f'{len(DATASETS.build(dataset))} images of' in pairs.summary


# --- numbering ---------------------------------------------------------------------------------

def test_colours_to_numbers(tmp_path):
    colours = np.zeros((*SHAPE, 3), np.uint8)
    colours[0, 1], colours[1, 1] = (255, 0, 0), (0, 128, 64)
    source = folders(tmp_path, {'a': Image.fromarray(colours)}) / 'labels'
    (source / 'deep').mkdir()
    Image.fromarray(colours).save(source / 'deep/b.png')
    run_tool('tools/map_labels.py', [str(source), str(tmp_path / 'out'), '0,0,0=255', '255,0,0=0',
                                     '0,128,64=7'])
    expected = np.full(SHAPE, 255, np.uint8)
    expected[0, 1], expected[1, 1] = 0, 7
    for name in ('a.png', 'deep/b.png'):
        image = Image.open(tmp_path / 'out' / name)
        assert image.mode == 'L' and np.array_equal(np.asarray(image), expected)
    with pytest.raises(ValueError, match=r'a.png holds 1 values .* for example 0,128,64'):
        map_labels(str(source), str(tmp_path / 'out2'), parse_mapping(['0,0,0=0', '255,0,0=1']))
    with pytest.raises(ValueError, match='a.png is in colour'):
        map_labels(str(source), str(tmp_path / 'out3'), {0: 0})
    with pytest.raises(FileExistsError, match='not empty'):
        map_labels(str(source), str(tmp_path / 'out'), {(0, 0, 0): 0})


@pytest.mark.parametrize('entries, words', [
    (['255'], "'255' is not a mapping"), (['1,2=3'], 'not a mapping'), (['a=1'], 'not a mapping'),
    (['0=256'], 'not a mapping'), (['0=-1'], 'not a mapping'), (['0=0', '0,0,0=1'], 'not both'),
    (['1=2=3'], 'not a mapping'), ([], 'not both or none')])
def test_bad_mappings(entries, words):
    with pytest.raises(ValueError, match=words):
        parse_mapping(entries)


# --- classes of the user's own ------------------------------------------------------------------

def test_suffixes_that_a_class_hands_to_its_base(tmp_path):
    from mmseg.datasets import BaseSegDataset

    class OwnData(BaseSegDataset):  # as mmseg's tutorial writes it
        METAINFO = dict(classes=('no', 'yes'), palette=[[0, 0, 0], [9, 9, 9]])

        def __init__(self, **kwargs):
            super().__init__(img_suffix='.tif', seg_map_suffix='_m.png', reduce_zero_label=True,
                             **kwargs)

    folders(tmp_path, {'a_m': grey(1, 2)})
    (tmp_path / 'images' / 'a_m.jpg').rename(tmp_path / 'images' / 'a.tif')
    cfg = config(tmp_path)
    cfg.train_dataloader.dataset.update(type=OwnData)
    facts = []
    assert check_classes(cfg, ['train'], facts) == []
    assert facts[0].startswith(f'The train data: 1 images of {tmp_path}/images are used')
    Image.fromarray(grey(3)).save(tmp_path / 'labels' / 'a_m.png')
    assert 'has label 3, but with 2 classes and reduce_zero_label=True' in refusal(cfg)


@pytest.mark.parametrize('kind', ['OwnLoadAnnotations', 'mine.LoadAnnotations'])
def test_colours_that_a_transform_of_the_user_reads(tmp_path, kind):
    from mmseg.datasets.transforms import LoadAnnotations
    cfg = config(folders(tmp_path, {'a': np.zeros((4, 4, 3), np.uint8)}))
    assert 'is a colour picture' in refusal(cfg)
    step = cfg.train_dataloader.dataset.pipeline[1]
    for nested in (dict(type='RandomApply', transforms=[dict(step)]),
                   dict(step, type=LoadAnnotations)):
        cfg.train_dataloader.dataset.pipeline[1] = nested
        assert 'is a colour picture' in refusal(cfg)
    cfg.train_dataloader.dataset.pipeline[1] = dict(type=kind)
    assert check_classes(cfg, ['train']) == []
