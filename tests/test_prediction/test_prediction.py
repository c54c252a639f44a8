"""mmhybrid.load(weights).predict(pictures): plain results, equal to those of mmdet and mmseg."""
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools.coco import COCO
from shrink import shrink
from trained import trained

import mmhybrid
from mmhybrid.errors import UserError
from mmhybrid.prediction.loading import find_checkpoint
from mmhybrid.prediction.results import Detection, Segmentation, encoded
from mmhybrid.weights import WeightsError

CONFIGS = Path(__file__).parents[2] / 'configs'
DET, SEG = 'cascade_mambavision_mini_coco', 'upernet_mambavision_mini_ade20k'
CLASSES = {DET: tuple(f'thing {n}' for n in range(80)),
           SEG: tuple(f'stuff {n}' for n in range(150))}
PIXELS = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
pytestmark = pytest.mark.filterwarnings('ignore')
pytest.importorskip('mmdet'), pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    for name in (DET, SEG):
        trained(shrink(Config.fromfile(CONFIGS / f'{name}.py')), folder / f'{name}.pth',
                CLASSES[name])
    return folder


@pytest.fixture(scope='module')
def detector(files):
    return mmhybrid.load(files / f'{DET}.pth', device='cpu')


@pytest.fixture(scope='module')
def segmentor(files):
    return mmhybrid.load(str(files / f'{SEG}.pth'), device='cpu')


@pytest.fixture
def path(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    return str(tmp_path / 'a.png')


def assert_same(one, other):
    if isinstance(one, Segmentation):
        assert np.array_equal(one.map, other.map)
        return
    for name in ('boxes', 'scores', 'labels'):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-3)
    assert one.rles == other.rles


def test_results_are_those_of_mmdet_and_mmseg_in_one_process(detector, segmentor, path):
    from mmdet.apis import inference_detector
    from mmseg.apis import inference_model
    scope = DefaultScope.get_current_instance().scope_name
    ours = detector.predict(path, score=0)[0], segmentor.predict(path)[0]
    again = detector.predict(path, score=0)[0]
    assert DefaultScope.get_current_instance().scope_name == scope  # as it was
    assert_same(ours[0], again)
    detector.model.cfg, segmentor.model.cfg = detector.cfg, segmentor.cfg
    boxes = inference_detector(detector.model, path).pred_instances
    order = boxes.scores.argsort(descending=True, stable=True)
    assert len(ours[0]) == len(boxes) > 0
    np.testing.assert_allclose(ours[0].boxes, boxes.bboxes[order].numpy(), atol=1e-4)
    assert np.array_equal(ours[0].labels, boxes.labels[order].numpy())
    assert np.array_equal(ours[0].masks, boxes.masks[order].numpy())
    assert ours[0].names == CLASSES[DET]
    regions = inference_model(segmentor.model, path).pred_sem_seg.data[0].numpy()
    assert np.array_equal(ours[1].map, regions)
    assert ours[1].palette[3] == (4, 2, 3)  # the checkpoint's


def as_pillow(kind):
    image = Image.fromarray(PIXELS)
    return image.convert(kind) if kind in ('L', 'RGBA', 'P', '1', 'CMYK') else image


@pytest.mark.parametrize('kind', ['RGB', 'L', 'RGBA', 'P', '1', '16 bits', 'one channel'])
def test_arrays_and_pictures_are_seen_as_their_files(detector, segmentor, kind, tmp_path):
    """Grey, with transparency, with a palette, with 16 bits: as OpenCV reads the file."""
    if kind in ('16 bits', 'one channel'):
        picture = array = (PIXELS[..., :1].astype(np.uint16) * 257 if kind == '16 bits'
                           else PIXELS[..., :1])
        Image.fromarray(array[..., 0]).save(tmp_path / 'a.png')
    else:
        picture = as_pillow(kind)
        picture.save(tmp_path / 'a.png')
        array = np.asarray(picture.convert('RGB') if kind in ('P', '1') else picture)
    for predictor, options in ((detector, dict(score=0)), (segmentor, {})):
        from_file, from_array, given = predictor.predict(
            [tmp_path / 'a.png', array, picture], **options)
        assert from_file.size == from_array.size == (60, 80)
        assert_same(from_file, from_array)
        assert_same(from_file, given)


def test_exif_turns_a_picture_upright(segmentor, tmp_path):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / 'a.png', exif=exif)
    turned, upright = segmentor.predict([tmp_path / 'a.png', np.rot90(PIXELS, -1)])
    assert turned.size == (80, 60)
    assert_same(turned, upright)
    assert_same(turned, segmentor.predict(Image.open(tmp_path / 'a.png'))[0])
    assert turned.plot(enlarge=False).size == (60, 80)


@pytest.mark.parametrize(('given', 'message'), [
    (np.zeros((4, 5, 2), np.uint8), r'got an array \(4, 5, 2\) of uint8'),
    (np.zeros((4, 5, 3), np.float32), r'float32 .* \(255 \* x\)'),
    (np.zeros((0, 5, 3), np.uint8), r'\(0, 5, 3\)'), (5, 'got a int as a picture'),
    (torch.zeros(3, 4, 5), 'got a Tensor as a picture')])
def test_what_is_no_picture_is_a_type_error(segmentor, given, message):
    with pytest.raises(TypeError, match=message):
        segmentor.predict([given])


def test_files_that_are_no_pictures_are_named(segmentor, tmp_path):
    (tmp_path / 'a.jpg').write_text('hello')
    with pytest.raises(UserError, match=r'a\.jpg is text inside.* or leave it out'):
        segmentor.predict(tmp_path / 'a.jpg')
    with pytest.raises(UserError, match=r'There is no picture .*b\.jpg\.'):
        segmentor.predict([str(tmp_path / 'b.jpg')])
    assert segmentor.predict([]) == []


@pytest.mark.parametrize('batch', [2, 7])
def test_results_do_not_depend_on_the_batch(detector, segmentor, batch):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, size, dtype=np.uint8) for size in (
        (60, 80, 3), (60, 80, 3), (90, 40, 3), (60, 80, 3))]
    for predictor, options in ((detector, dict(score=0)), (segmentor, {})):
        for one, other in zip(predictor.predict(images, **options),
                              predictor.predict(iter(images), batch=batch, **options),
                              strict=True):
            assert_same(one, other)
            assert one.size == other.size


def test_score_and_classes_choose(detector, segmentor):
    (every,) = detector.predict(PIXELS, score=0)
    assert len(every) == 5 and (np.diff(every.scores) <= 0).all()
    limit = float(every.scores[2])
    assert len(detector.predict(PIXELS, score=limit)[0]) == 3
    assert len(detector.predict(PIXELS)[0]) == 0  # 0.3
    name = every.names[every.labels[-1]]
    (some,) = detector.predict(PIXELS, score=0, classes=[name])
    assert {some.names[label] for label in some.labels} == {name}
    assert len(some) == (every.labels == every.labels[-1]).sum()
    (regions,) = segmentor.predict(PIXELS)
    label = regions.present[0]
    (only,) = segmentor.predict(PIXELS, classes=[regions.names[label]])
    assert only.present == [label] and only.nothing == 255
    assert np.array_equal(only.map == label, regions.map == label)
    assert (only.map[regions.map != label] == 255).all()


@pytest.mark.parametrize(('options', 'message'), [
    (dict(classes=['thing 7x']), "no class 'thing 7x'. Did you mean 'thing 7"),
    (dict(classes='thing 7'), 'expected a list of names'),
    (dict(score=1.5), 'threshold is 1.5'), (dict(score=float('nan')), 'threshold is nan'),
    (dict(tile=8), 'Tiles of 8 pixels'), (dict(tile=64, overlap=1), 'overlap of tiles is 1'),
    (dict(batch=0), 'batch is 0')])
def test_settings_that_make_no_sense(detector, options, message):
    with pytest.raises(UserError, match=message):
        detector.predict(PIXELS, **options)


def test_a_segmentor_has_no_score(segmentor):
    with pytest.raises(UserError, match='score threshold is for detectors'):
        segmentor.predict(PIXELS, score=0.5)


def test_tiles_of_a_picture_that_fits_change_nothing(detector, segmentor):
    for predictor, options in ((detector, dict(score=0)), (segmentor, {})):
        assert_same(predictor.predict(PIXELS, **options)[0],
                    predictor.predict(PIXELS, tile=80, **options)[0])


def test_tiles_of_a_larger_picture(detector, segmentor):
    image = np.tile(PIXELS, (2, 2, 1))
    (found,) = detector.predict(image, score=0, tile=80, overlap=0.25, batch=3)
    assert found.size == (120, 160) and found.masks.shape[1:] == (120, 160) and len(found) > 5
    assert (found.boxes[:, 2:] <= (160, 120)).all() and (found.boxes >= 0).all()
    (regions,) = segmentor.predict(image, tile=64, overlap=0.25)
    assert regions.size == (120, 160) and regions.map.max() < 150


def test_test_time_augmentation(files):
    detector = mmhybrid.load(files / f'{DET}.pth', tta=True, device='cpu')
    assert any('merges boxes only' in note for note in detector.notes)
    found, other = detector.predict([PIXELS, PIXELS[:, ::-1]], score=0)
    assert len(found) and found.rles is None and found.masks is None
    mirrored = other.boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (80, 0, 80, 0)
    np.testing.assert_allclose(found.boxes, mirrored, atol=1e-2)  # both mirror images are seen
    segmentor = mmhybrid.load(files / f'{SEG}.pth', tta=True, device='cpu')
    assert segmentor.predict(PIXELS)[0].size == (60, 80)


# --- results --------------------------------------------------------------------------------------

MASK = np.zeros((40, 50), bool)
MASK[10:20, 5:25] = True


def detection(masks=True):
    return Detection(np.zeros((40, 50, 3), np.uint8), (40, 50),
                     np.array([[5, 10, 25, 20], [1.5, 2.25, 30, 40]], np.float32),
                     np.array([0.9, 0.5], np.float32), np.array([2, 0]), ('a', 'b', 'c'),
                     [encoded(MASK), encoded(~MASK)] if masks else None)


def regions():
    found = np.full((40, 50), 255, np.uint8)
    found[MASK], found[30:] = 2, 0
    return Segmentation(np.zeros((40, 50, 3), np.uint8), found, ('a', 'b', 'c'),
                        ((1, 2, 3), (4, 5, 6), (200, 100, 50)))


@pytest.mark.parametrize('make', [detection, lambda: detection(False), regions])
def test_coco_reads_what_is_written(make, tmp_path):
    truth = COCO()
    truth.dataset = dict(images=[dict(id=7, height=40, width=50)], annotations=[],
                         categories=[dict(id=n + 1, name=name) for n, name in enumerate('abc')])
    truth.createIndex()
    found = truth.loadRes(make().to_coco(7)) if 'score' in make().to_coco(7)[0] else None
    first = make().to_coco(7)[-1 if make is regions else 0]
    assert first['category_id'] == 3 and first['bbox'] == [5, 10, 20, 10] and first['area'] == 200
    if found is not None:
        assert [each['image_id'] for each in found.anns.values()] == [7, 7]
    if 'segmentation' in first:
        assert np.array_equal(truth.annToMask(first).astype(bool), MASK)


def test_part_of_a_detection():
    both = detection()
    assert both.chosen([1]).labels.tolist() == [0] and len(both.chosen([])) == 0
    assert both.chosen(both.scores > 0.6).labels.tolist() == [2]
    assert np.array_equal(both.chosen([1, 0]).masks[1], MASK)


def test_pictures_of_results():
    drawn = np.asarray(detection().plot(enlarge=False))
    assert drawn.shape == (40, 50, 3) and drawn[15, 20].any()
    drawn = np.asarray(regions().plot(enlarge=False))
    assert tuple(drawn[35, 2]) != (0, 0, 0) and not drawn[3:9, 40:].any()
    assert detection().plot().size == (450, 360)  # enlarged, so that names can be read


def test_the_map_of_a_segmentation_as_a_picture():
    image = regions().to_image()
    assert image.mode == 'P' and np.array_equal(np.asarray(image), regions().map)
    assert image.convert('RGB').getpixel((6, 11)) == (200, 100, 50)
    many = Segmentation('a', np.full((2, 2), 300, np.uint16), ('x',) * 400, ((0, 0, 0),) * 400)
    assert many.nothing == 65535 and np.asarray(many.to_image()).tolist() == [[300] * 2] * 2


def test_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, 'supervision', None)
    with pytest.raises(ImportError, match='pip install supervision'):
        detection().to_supervision()
    module = types.ModuleType('supervision')
    module.Detections = lambda **values: types.SimpleNamespace(**values)
    monkeypatch.setitem(sys.modules, 'supervision', module)
    found = detection().to_supervision()
    assert found.xyxy.shape == (2, 4) and found.mask.shape == (2, 40, 50)
    assert found.data['class_name'].tolist() == ['c', 'a']
    found = regions().to_supervision()
    assert found.class_id.tolist() == [0, 2] and found.xyxy[1].tolist() == [5, 10, 25, 20]


# --- loading --------------------------------------------------------------------------------------

def write(path, cfg, state=None, **meta):
    torch.save(dict(meta=dict(cfg=cfg, **meta), state_dict=state or {}), path)
    return path


def test_a_run_stands_for_its_best_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r'holds no checkpoint \(\*\.pth\)'):
        find_checkpoint(str(tmp_path))
    for name in ('epoch_9.pth', 'epoch_10.pth'):
        (tmp_path / name).touch()
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_9.pth')  # the run was moved
    assert find_checkpoint(str(tmp_path))[0] == str(tmp_path / 'epoch_9.pth')
    (tmp_path / 'best_coco_bbox_mAP_epoch_3.pth').touch()
    path, (note,) = find_checkpoint(str(tmp_path))
    assert path.endswith('_epoch_3.pth') and 'the best checkpoint of this run' in note
    assert find_checkpoint('mambavision-t-1k') == ('mambavision-t-1k', [])
    with pytest.raises(UserError, match='Its folders .* hold some'):
        find_checkpoint(str(tmp_path.parent))


HOME = "default_scope='mmdet'\ntest_dataloader=dict(dataset=dict(pipeline=[dict(type='X')]))\n"
REFUSED = {
    "model=dict(type='os.mkdir', path='ran')\n" + HOME: (
        r"could run code.*model \(type='os\.mkdir'.*--config FILE.*--trust"),
    "import os\nmodel=dict(type='X')\n" + HOME: 'does more than set plain values.*--config FILE',
    "model=dict(type='MineNet')\ncustom_imports=dict(imports=['mine.nets'])\n" + HOME: (
        r'MineNet.*not registered[\s\S]*mine\.nets[\s\S]*--config FILE'),
    "model=dict(type='RetinaNet', backbone=dict(type='mine.Net'))\n" + HOME: r'model\.backbone',
    "model=dict(type='RetinaNet')\n" + HOME.replace("dict(type='X')", "dict(type='mine.Load')"): (
        r'test_dataloader\.dataset\.pipeline\[0\]'),
    "model=dict(type='RetinaNet')\ndefault_scope='mmdet'\n": 'no test_dataloader.dataset.pipeline',
    "model=dict(type='mmhybrid.ImageClassifier')\ndefault_scope='mmengine'\n": (
        'expected a detector of mmdet or a segmentor of mmseg'),
    HOME: 'no model=dict', None: r'holds no config\. Give the config file'}


@pytest.mark.parametrize('text', REFUSED)
def test_configs_that_are_not_followed(text, tmp_path):
    with pytest.raises(UserError, match=REFUSED[text]):
        mmhybrid.load(write(tmp_path / 'w.pth', text), device='cpu')
    assert not Path('ran').exists()


def test_a_module_of_the_user_needs_trust_or_a_config(files, tmp_path, monkeypatch):
    """Both lead to the same results as the checkpoint did whose config needs nothing."""
    (tmp_path / 'mine_nets.py').write_text(
        'from mmengine.registry import MODELS\nfrom mmdet.models import CascadeRCNN\n'
        '@MODELS.register_module(force=True)\nclass MineRCNN(CascadeRCNN):\n    pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = torch.load(files / f'{DET}.pth', weights_only=False)
    cfg = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    cfg.merge_from_dict(dict(model=dict(type='MineRCNN'), custom_imports=dict(
        imports=['mine_nets'])))
    checkpoint['meta']['cfg'] = cfg.pretty_text
    torch.save(checkpoint, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'mine_nets[\s\S]*--config FILE.*--trust'):
        mmhybrid.load(tmp_path / 'w.pth', device='cpu')
    assert 'mine_nets' not in sys.modules
    (expected,) = mmhybrid.load(files / f'{DET}.pth', device='cpu').predict(PIXELS, score=0)
    cfg.dump(tmp_path / 'mine.py')
    for options in (dict(trust=True), dict(config=tmp_path / 'mine.py')):
        predictor = mmhybrid.load(tmp_path / 'w.pth', device='cpu', **options)
        assert type(predictor.model).__name__ == 'MineRCNN'
        assert_same(predictor.predict(PIXELS, score=0)[0], expected)


@pytest.mark.parametrize(('text', 'message'), [
    ("custom_imports = dict(imports=['mine_absent'])", "imported: No module named 'mine_absent'"),
    ('x = 1 / 0', r'cannot be read\. ZeroDivisionError: division by zero')])
def test_trusted_configs_that_fail(text, message, tmp_path):
    with pytest.raises(UserError, match=rf'config inside .*w\.pth .*{message}\.'):
        mmhybrid.load(write(tmp_path / 'w.pth', text + '\n' + HOME), device='cpu', trust=True)


def test_no_temporary_file_is_needed(files, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('tempfile.NamedTemporaryFile', full)
    mmhybrid.load(files / f'{SEG}.pth', device='cpu')
    with pytest.raises(UserError, match='want of a temporary file: No space left on device'):
        mmhybrid.load(write(tmp_path / 'w.pth', 'x = 1 + 1\n' + HOME), device='cpu', trust=True)


def test_weights_that_cannot_work(files, tmp_path):
    checkpoint = torch.load(files / f'{SEG}.pth', weights_only=False)
    state = checkpoint['state_dict']
    key = next(iter(state))
    state[key] = state[key] * float('nan')
    torch.save(checkpoint, tmp_path / 'nan.pth')
    with pytest.raises(UserError, match=f'{key} holds numbers that are not finite'):
        mmhybrid.load(tmp_path / 'nan.pth', device='cpu')
    del state[key]
    torch.save(checkpoint, tmp_path / 'less.pth')
    with pytest.raises(UserError, match=rf'are not in the file:\s+{key}'):
        mmhybrid.load(tmp_path / 'less.pth', device='cpu')
    torch.save([torch.zeros(2)], tmp_path / 'list.pth')
    with pytest.raises(WeightsError, match='holds a list'):
        mmhybrid.load(tmp_path / 'list.pth', device='cpu')
    with pytest.raises(UserError, match=r'absent\.pth does not exist'):
        mmhybrid.load(tmp_path / 'absent.pth', device='cpu')


@pytest.mark.parametrize('device', ['cuda:77', 'gpu', 'meta'])
def test_devices_that_are_not_there(files, device):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used.*This machine has cpu"):
        mmhybrid.load(files / f'{SEG}.pth', device=device)


def test_options_change_the_config(files):
    options = {'model.test_cfg.rcnn.max_per_img': 2}
    assert len(mmhybrid.load(files / f'{DET}.pth', device='cpu', options=options).predict(
        PIXELS, score=0)[0]) == 2


def test_classes_without_names(files, tmp_path):
    checkpoint = torch.load(files / f'{SEG}.pth', weights_only=False)
    checkpoint['meta']['dataset_meta'] = dict(classes=('road', 'sky'))
    torch.save(checkpoint, tmp_path / 'w.pth')
    predictor = mmhybrid.load(tmp_path / 'w.pth', device='cpu')
    assert predictor.names[:3] == ('road', 'sky', 'class 2') and len(predictor.names) == 150
    assert any('name 2 of 150 classes' in note for note in predictor.notes)
    del checkpoint['meta']['dataset_meta']  # the data set of the config knows
    torch.save(checkpoint, tmp_path / 'w.pth')
    assert mmhybrid.load(tmp_path / 'w.pth', device='cpu').names[:2] == ('wall', 'building')
