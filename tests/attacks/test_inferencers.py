"""Detectors and segmentors of ours in one process, through the interfaces of mmdet and mmseg."""
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope, init_default_scope
from PIL import Image
from shrink import shrink

import mmhybrid.plugin  # noqa: F401  registers

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
PICTURE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
pytestmark = pytest.mark.filterwarnings('ignore')


def small(kind):
    name = {'det': 'cascade_mambavision_mini_coco', 'seg': 'upernet_mambavision_mini_ade20k'}[kind]
    return shrink(Config.fromfile(CONFIGS / f'{name}.py'))


@pytest.fixture(scope='module')
def detector():
    return pytest.importorskip('mmdet.apis').init_detector(small('det'), device='cpu')


@pytest.fixture(scope='module')
def segmentor():
    return pytest.importorskip('mmseg.apis').init_model(small('seg'), device='cpu')


@pytest.fixture
def path(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / 'a.png')
    return str(tmp_path / 'a.png')


def detect(model, picture):
    from mmdet.apis import inference_detector
    return inference_detector(model, picture).pred_instances


def segment(model, picture):
    from mmseg.apis import inference_model
    return inference_model(model, picture).pred_sem_seg.data


@pytest.mark.parametrize('last', ['mmdet', 'mmseg'])
def test_functions_in_any_order(detector, segmentor, path, last):
    """Whichever model was built last, and whether the picture is a file or an array."""
    init_default_scope(last)
    boxes = detect(detector, path).bboxes
    assert boxes.shape[1] == 4
    regions = segment(segmentor, path)
    assert regions.shape == (1, 60, 80)
    assert torch.equal(detect(detector, path).bboxes, boxes)
    assert torch.equal(detect(detector, PICTURE[..., ::-1].copy()).bboxes, boxes)
    assert torch.equal(segment(segmentor, path), regions)
    assert DefaultScope.get_current_instance().scope_name == last  # as the user left it


def test_inferencers_in_any_order():
    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer
    make = dict(det=lambda: DetInferencer(small('det'), device='cpu', show_progress=False),
                seg=lambda: MMSegInferencer(small('seg'), device='cpu'))
    tools = {kind: make[kind]() for kind in ('seg', 'det')}
    for kind in ('det', 'seg', 'det'):
        found = tools[kind](PICTURE)['predictions']
        assert found.shape == (60, 80) if kind == 'seg' else 'bboxes' in found[0]
    for kind in ('seg', 'det'):  # a second of its kind, built after the other kind
        found = make[kind]()(PICTURE)['predictions']
        assert found.shape == (60, 80) if kind == 'seg' else 'masks' in found[0]


def test_grey_arrays(detector, segmentor, tmp_path):
    grey = PICTURE[..., 0]
    Image.fromarray(grey).save(tmp_path / 'grey.png')
    expected = detect(detector, str(tmp_path / 'grey.png')).bboxes
    for array in (grey, grey[..., None], np.repeat(grey[..., None], 3, axis=2)):
        assert torch.equal(detect(detector, array).bboxes, expected)
    assert segment(segmentor, grey).shape == (1, 60, 80)


def test_grey_arrays_for_the_inferencer():
    from mmdet.apis import DetInferencer
    detect_all = DetInferencer(small('det'), device='cpu', show_progress=False)
    grey = PICTURE[..., 0]
    found = detect_all([grey, np.repeat(grey[..., None], 3, axis=2)], batch_size=2)['predictions']
    assert found[0]['bboxes'] == found[1]['bboxes']


def test_arrays_that_are_not_grey_pass_untouched():
    for array in (PICTURE, np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 2), np.float32)):
        sample = Compose([dict(type='mmdet.LoadImageFromNDArray')])(dict(img=array))
        assert sample['img'] is array
    grey = PICTURE[..., 0]
    pipeline = Compose([dict(type='mmdet.LoadImageFromNDArray', color_type='grayscale')])
    assert pipeline(dict(img=grey))['img'] is grey


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_pipelines_that_can_be_built_are_built_as_before(scope):
    """Names that both know are the current scope's; unknown ones are an error that names them."""
    from mmcv.transforms import Compose as MmcvCompose
    init_default_scope(scope)
    for compose in (Compose, MmcvCompose):
        (loader,) = compose([dict(type='LoadAnnotations')]).transforms
        assert type(loader).__module__.startswith(scope)
        assert compose(None).transforms == [] and compose([]).transforms == []
        with pytest.raises(KeyError, match='LoadAnnotation '):
            compose([dict(type='LoadAnnotation')])
        with pytest.raises(KeyError, match='PackDetInputs|PackSegInputs'):
            compose([dict(type='PackDetInputs'), dict(type='PackSegInputs')])


def test_threads(detector, segmentor, path):
    boxes, regions = detect(detector, path).bboxes, segment(segmentor, path)
    failures = []

    def work(call, model, expected):
        try:
            for _ in range(3):
                found = call(model, path)
                found = found if call is segment else found.bboxes
                assert torch.equal(found, expected)
        except BaseException as error:
            failures.append(error)

    jobs = [(detect, detector, boxes), (segment, segmentor, regions)]
    threads = [threading.Thread(target=work, args=job) for job in itertools.chain(jobs, jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
