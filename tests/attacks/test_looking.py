"""mmhybrid visualize on odd pictures, odd sets and odd wishes."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from looked_at import write_run
from PIL import Image

from mmhybrid import cli
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def there(tmp_path_factory):
    """A detector without scans and a segmentor with some, and small sets."""
    folder = tmp_path_factory.mktemp('looking')
    write_mini_coco(folder / 'coco', train=4, val=3)
    write_mini_ade20k(folder / 'ade', train=4, val=2)
    return SimpleNamespace(det=write_run('cascade_mambavision_mini_coco', folder / 'det'),
                           seg=write_run('upernet_vmamba_mini_ade20k', folder / 'seg'),
                           coco=folder / 'coco', ade=folder / 'ade')


@pytest.fixture
def look(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        capfd.readouterr()
        try:
            ended = cli.main(['visualize', *map(str, arguments)])
        except SystemExit as end:
            ended = end.code
        said = capfd.readouterr()
        assert ended == code, said.err
        assert 'Traceback' not in said.err
        return said.out + said.err
    return run


@pytest.fixture
def coco(there, tmp_path):
    """A copy of the set; called with a change of its test annotations."""
    def changed(change):
        shutil.copytree(there.coco, tmp_path / 'coco', dirs_exist_ok=True)
        path = tmp_path / 'coco/annotations/instances_val2017.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return tmp_path / 'coco'
    return changed


def odd(content):
    """The first image grey and without objects, the second's objects a crowd, the third one pixel.
    """
    first, second, third = (each['id'] for each in content['images'])
    content['annotations'] = [each for each in content['annotations']
                              if each['image_id'] not in (first, third)]
    for each in content['annotations']:
        each.update(iscrowd=1, segmentation=dict(
            size=[content['images'][1][side] for side in ('height', 'width')],
            counts=[0, content['images'][1]['height'] * content['images'][1]['width']]))
    one = dict(content['annotations'][0], id=9999, iscrowd=0, segmentation=[[1, 1, 9, 1, 9, 9]],
               bbox=[1, 1, 8, 8], area=32, image_id=first)
    content['images'][2].update(width=1, height=1)
    content['annotations'].append(one)


def test_odd_sets(there, coco, look):
    data = coco(odd)
    names = [each['file_name'] for each in json.loads(
        (data / 'annotations/instances_val2017.json').read_text())['images']]
    Image.open(data / 'val2017' / names[0]).convert('L').save(data / 'val2017' / names[0])
    Image.new('RGB', (1, 1), 'red').save(data / 'val2017' / names[2])
    look(there.det, '--data-root', data, '--errors', '--out-dir', 'errors')
    report = json.loads(Path('errors/errors.json').read_text())
    assert (report['images'], report['objects']) == (3, 1)
    crowd = [each for each in report['mistakes'] if each['image'].endswith(names[1])]
    assert {each['kind'] for each in crowd} <= {'background'}
    for mode in ('--features', '--cam'):
        look(there.det, '--data-root', data, mode, '--out-dir', mode[2:])
        assert {path.stem for path in Path(mode[2:]).iterdir()} <= {
            Path(name).stem for name in names}
    assert len(list(Path('features').iterdir())) == 3


def test_nothing_found(there, look):
    nothing = '--cfg-options', 'model.test_cfg.rcnn.score_thr=1.0'
    data = '--data-root', there.coco
    said = look(there.det, *data, '--errors', '--out-dir', 'errors', *nothing)
    report = json.loads(Path('errors/errors.json').read_text())
    assert report['counts'] == {**dict.fromkeys(report['counts'], 0), 'missed': report['objects']}
    assert report['ap50'] == 0 and report['cost']['missed'] == 1 and '+100.0' in said
    assert {path.name for path in Path('errors').glob('*.png')} == {
        'errors.png', 'errors_missed.png'}
    said = look(there.det, *data, '--cam', '--out-dir', 'cam', *nothing)
    assert said.count('nothing found that could be explained') == 3
    assert 'No object has a score of 0.5 or more; --score-thr lowers that.' in said
    assert list(Path('cam').iterdir()) == []


def test_nothing_to_find(there, coco, look):
    data = coco(lambda content: content['annotations'].clear())
    said = look(there.det, '--data-root', data, '--errors', code=1)
    assert 'None of the 3 images of the test set has an annotated object' in said
    copy = Path('ade')
    shutil.copytree(there.ade, copy)
    for path in copy.glob('**/annotations/validation/*.png'):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    said = look(there.seg, '--data-root', copy, '--errors', code=1)
    assert 'None of the 2 images of the test set has a labelled pixel' in said


def test_odd_pictures(there, look):
    """Of one pixel, grey, with 16 bits, of the same name."""
    Path('a').mkdir()
    Image.new('RGB', (1, 1), 'red').save('a/x.png')
    Image.new('L', (50, 40), 90).save('x.png')
    Image.fromarray(np.full((3, 90), 40000, np.uint16)).save('deep.png')
    pictures = '--images', 'a/x.png', 'x.png', 'deep.png'
    for mode in ('--directions', '--features', '--cam'):
        look(there.seg, mode, *pictures, '--out-dir', mode[2:])
        assert {path.name for path in Path(mode[2:]).iterdir()} == {
            'x.png', 'x_1.png', 'deep.png'}
    said = look(there.seg, '--directions', '--at', '10', '5', *pictures, code=1)
    assert '--at 10 5 lies outside of a/x.png, which is 1 x 1 pixels' in said


@pytest.mark.parametrize(('wish', 'words'), [
    (['--features', '--layer', 'backbone.layers.9'], "Did you mean 'backbone."),
    (['--features', '--layer', 'decode_head.conv_seg'], None),
    (['--features', '--layer', 'backbone.layers.0.blocks.0.op.out_norm', 'nek'],
     "no layer 'nek'"),
    (['--cam', '--classes', 'wal'], "knows no class 'wal'. Did you mean 'wall"),
    (['--directions', '--layer', 'decode_head'], 'The layer decode_head of VMamba holds no scans'),
    (['--features', '--images', 'nowhere.jpg'], 'There is no nowhere.jpg'),
    (['--cam', '--images', 'text.jpg'], 'text.jpg is text inside'),
    (['--cam', '--images', 'film.mp4'], 'film.mp4 is none of these but of the kind "video"'),
    (['--features', '--images', 'empty'], 'The folder empty holds no picture'),
    (['--features', '--num', '0'], '--num is 0; expected at least 1'),
    (['--features', '--out-dir', 'text.jpg'], 'text.jpg cannot be made a folder'),
    (['--features', '--out-dir', ''], '--out-dir is empty'),
    (['--features', '--data-root', 'nowhere'], 'nowhere'),
])
def test_odd_wishes(there, look, wish, words):
    Path('text.jpg').write_text('hello')
    Path('film.mp4').write_text('')
    Path('empty').mkdir()
    data = [] if '--images' in wish or '--data-root' in wish else ['--data-root', there.ade]
    said = look(there.seg, *wish, *data, code=int(words is not None))
    assert words is None or words in said


def test_an_exported_model_is_refused(look):
    for mode in ([], ['--cam']):
        assert 'model.onnx is an exported model, which has no layers' in look(
            'model.onnx', *mode, code=1)


def test_a_damaged_image_is_named(there, coco, look):
    data = coco(lambda content: None)
    victim = sorted((data / 'val2017').iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:200])
    assert victim.name in look(there.det, '--data-root', data, '--errors', code=1)


def test_layers_that_are_no_maps_and_scores(there, look):
    data = '--data-root', there.coco
    said = look(there.det, *data, '--features', '--layer', 'roi_head.bbox_head.0', code=1)
    assert 'The layer roi_head.bbox_head.0' in said and 'is no map of the picture' in said
    assert 'The score threshold is 2.0; expected 0 to 1' in look(
        there.det, *data, '--cam', '--score-thr', 2, code=1)
    # masks are left out, so that head is not asked
    assert 'have no gradient with respect to that layer: the layer is not used' in look(
        there.det, *data, '--cam', '--score-thr', 0, '--layer', 'roi_head.mask_head.0', code=1)


@pytest.mark.parametrize(('wish', 'words'), [
    (['--errors', '--layer', 'neck'], '--layer belongs to --features, --cam, --directions, not to '
                                      '--errors'),
    (['--errors', '--images', 'x'], '--images belongs to --features, --cam, --directions, '
                                    '--receptive-field, not to --errors'),
    (['--cam', '--at', '1', '2'], '--at belongs to --directions, not to --cam'),
    (['--classes', 'x'], '--classes belongs to --cam'),
    (['--size', '64'], '--size belongs to --receptive-field'),
    (['--features', '--score-thr', '0'], '--score-thr belongs to --cam and pictures of the test '
                                         'set, not to --features'),
    (['--features', '--cam'], 'not allowed with argument'),
    (['--cam', '--cam-method', 'best'], "invalid choice: 'best'"),
    (['--receptive-field', 'Vim:tiny', '--data-root', 'x'], '--data-root belongs to'),
])
def test_options_without_effect_are_refused(look, wish, words):
    assert words in look('run', *wish, code=2)
