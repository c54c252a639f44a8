"""Errors inside data pipelines, whatever holds the transform, and limits of the machine."""
import gc
import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.training import parse, run_training, training_parser
from mmhybrid.datasets.loading.checks import check_classes, check_data
from mmhybrid.datasets.loading.pipeline_guard import guard_image_files
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco
from mmhybrid.datasets.mini_imagenet import write_mini_imagenet
from mmhybrid.engine.config import load_config
from mmhybrid.engine.explanations import explain
from mmhybrid.errors import UserError

LOAD = dict(type='LoadImageFromFile')
CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
GENERATED = {
    'mini_coco': ('cascade_mambavision_mini_coco.py', write_mini_coco),
    'mini_ade20k': ('upernet_mambavision_mini_ade20k.py', write_mini_ade20k),
    'mini_imagenet': ('classification/localvmamba_mini_imagenet.py', write_mini_imagenet),
}


class Broken:
    """A transform with a programming error, not one of mmcv's."""

    def __call__(self, results):
        return results['img'].no_such_attribute


@pytest.fixture(autouse=True)
def _guard(monkeypatch):
    init_default_scope('mmdet')
    pytest.importorskip('mmdet.datasets')
    guard_image_files()
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)


@pytest.fixture
def instances(tmp_path):
    """``instances(masks)``: config of four images with one object each."""
    for index in range(4):
        Image.new('RGB', (40, 30), (50 * index, 9, 9)).save(tmp_path / f'{index}.png')
    (tmp_path / 'a.json').write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f'{i}.png', width=40, height=30) for i in range(4)],
        annotations=[dict(id=i + 1, image_id=i, category_id=1, bbox=[1, 2, 20, 20], area=400,
                          iscrowd=0, segmentation=[[1, 2, 21, 2, 21, 22, 1, 22]])
                     for i in range(4)],
        categories=[dict(id=1, name='a')])))

    def make(masks=False, steps=()):
        return dict(
            type='CocoDataset', data_root=str(tmp_path), ann_file='a.json',
            data_prefix=dict(img=''), metainfo=dict(classes=('a',)),
            pipeline=[LOAD, dict(type='LoadAnnotations', with_bbox=True, with_mask=masks), *steps])
    return make


def mixed(inner, *steps):
    return DATASETS.build(dict(type='MultiImageMixDataset', dataset=inner, pipeline=list(steps)))


def fail_in(monkeypatch, name):
    """Have one kind of transform fail."""
    from mmdet.registry import TRANSFORMS

    def transform(self, results):
        raise ValueError('odd value')

    monkeypatch.setattr(TRANSFORMS.get(name), 'transform', transform)


# --- which image, which transform --------------------------------------------------------------

@pytest.mark.parametrize('step', ['Pad', 'RandomFlip', 'PackDetInputs'])
def test_any_transform(tmp_path, instances, monkeypatch, step):
    settings = dict(Pad=dict(size_divisor=32), RandomFlip=dict(prob=1.0), PackDetInputs={})[step]
    fail_in(monkeypatch, step)
    dataset = DATASETS.build(instances(steps=[dict(type=step, **settings)]))
    with pytest.raises(UserError, match=rf'^{tmp_path}/2.png: {step} failed \(the image is 40 x 30 '
                                        r'there\). ValueError: odd value'):
        dataset[2]


@pytest.mark.parametrize('around', [
    lambda step: dict(type='RandomApply', prob=1.0, transforms=[step]),
    lambda step: dict(type='RandomChoice', transforms=[[step], [step]]),
    lambda step: dict(type='TestTimeAug', transforms=[[step], [dict(type='PackDetInputs')]]),
    lambda step: dict(type='KeyMapper', mapping=dict(img='img', img_path='img_path'),
                      auto_remap=True, transforms=[step])],
    ids=['apply', 'choice', 'tta', 'mapper'])
def test_transforms_inside_others(tmp_path, instances, monkeypatch, around):
    """The innermost one is named."""
    fail_in(monkeypatch, 'Pad')
    dataset = DATASETS.build(instances(steps=[around(dict(type='Pad', size_divisor=32))]))
    with pytest.raises(UserError) as error:
        dataset[1]
    assert str(error.value).startswith(f'{tmp_path}/1.png: Pad failed (the image is 40 x 30')


@pytest.mark.parametrize('name, settings', [
    ('Mosaic', dict(img_scale=(64, 64))), ('MixUp', dict(img_scale=(64, 64))), ('CopyPaste', {}),
    ('RandomFlip', dict(prob=0.5))])
def test_mixes_of_images(tmp_path, instances, monkeypatch, name, settings):
    fail_in(monkeypatch, name)
    dataset = mixed(instances(True), dict(type=name, **settings))
    with pytest.raises(UserError) as error:
        dataset[3]
    text = str(error.value)
    assert text.startswith(f'{tmp_path}/3.png') and f'{name} failed' in text
    others = {'Mosaic': 3, 'MixUp': 1, 'CopyPaste': 1, 'RandomFlip': 0}[name]
    assert text.partition(')')[0].count('.png') == 1 + others


def test_mixes_of_label_images(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    from mmseg.registry import TRANSFORMS

    def transform(self, results):
        raise ValueError('odd value')

    monkeypatch.setattr(TRANSFORMS.get('RandomMosaic'), 'transform', transform)
    for name in ('images', 'labels'):
        (tmp_path / name).mkdir()
        Image.new('L', (8, 6)).save(tmp_path / name / 'a.png')
    inner = dict(type='BaseSegDataset', data_root=str(tmp_path), img_suffix='.png',
                 metainfo=dict(classes=('x', 'y')),
                 data_prefix=dict(img_path='images', seg_map_path='labels'),
                 pipeline=[LOAD, dict(type='LoadAnnotations')])
    dataset = DATASETS.build(dict(
        type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[inner]),
        pipeline=[dict(type='RandomMosaic', prob=1.0, img_scale=(16, 16))]))
    with pytest.raises(UserError, match=r'images/a.png \(mixed with .*a.png.*\): RandomMosaic'):
        dataset[0]


@pytest.mark.parametrize('workers', [0, 1])
def test_programming_errors(tmp_path, instances, capfd, workers):
    """One line, with the type; all of it with --traceback."""
    dataset = DATASETS.build(instances())
    dataset.pipeline.transforms.append(Broken())

    def main(argv):
        for _ in DataLoader(dataset, num_workers=workers, collate_fn=list):
            pass

    assert run_command(main, []) == 1
    output = capfd.readouterr().err
    assert 'Traceback' not in output
    assert f'ERROR: {tmp_path}/0.png: Broken failed (the image is 40 x 30 there)' in output
    assert "AttributeError: 'numpy.ndarray' object has no attribute 'no_such_attribute'" in output
    assert run_command(main, ['--traceback']) == 1
    output = capfd.readouterr().err
    assert 'Traceback' in output and "return results['img'].no_such_attribute" in output


def test_the_guard_changes_no_result(tmp_path, instances):
    """Also that None goes on to the data set, which then takes another image."""
    none = type('Drop', (), dict(__call__=lambda self, results: None))()
    assert Compose([none, Broken()])(dict(img_path='x')) is None
    sample = DATASETS.build(instances(True, [dict(type='PackDetInputs')]))[1]
    assert tuple(sample['inputs'].shape) == (3, 30, 40)
    assert sample['data_samples'].gt_instances.masks.masks.sum() > 0


@pytest.mark.parametrize('name', ['mini_coco', 'mini_ade20k', 'mini_imagenet'])
def test_generated_sets_pass(tmp_path, name):
    """No warning before training, no error in any sample, and as many samples as are counted."""
    config, write = GENERATED[name]
    write(tmp_path / name, **(dict(train=20, val=20) if name == 'mini_imagenet' else
                                   dict(train=4, val=2)))
    cfg, _ = load_config(str(CONFIGS / config), None, str(tmp_path / name))
    init_default_scope(cfg.default_scope)
    facts = []
    check_data(cfg, ['train', 'val'])
    assert check_classes(cfg, ['train', 'val'], facts) == []
    for split in ('train', 'val'):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        assert all(dataset[index] is not None for index in range(min(len(dataset), 6)))
        if name == 'mini_ade20k':
            (fact,) = [fact for fact in facts if fact.startswith(f'The {split} data')]
            assert f'{len(dataset)} images of' in fact and 'none is left out' in fact


def test_the_log_counts(tmp_path, monkeypatch):
    """One line for each split, in the log file."""
    write_mini_ade20k(tmp_path / 'data', train=4, val=2)
    picture = next((tmp_path / 'data/images/training').iterdir())
    picture.rename(picture.with_suffix('.JPG'))
    monkeypatch.setattr('mmengine.runner.Runner.train', lambda self: None)
    run_training(parse(training_parser('x'), [
        str(CONFIGS / 'upernet_mambavision_mini_ade20k.py'), '--data-root', str(tmp_path / 'data'),
        '--work-dir', str(tmp_path / 'w'), '--cfg-options', 'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False']))
    log = next((tmp_path / 'w').rglob('*.log')).read_text()
    assert log.count('The train data: 3 images of') == log.count('The val data: 2 images of') == 1
    assert f'1 of 4 files in {tmp_path}/data/images/training are left out' in log


def test_a_second_guard_is_none():
    first = Compose.__call__
    guard_image_files()
    assert Compose.__call__ is first


@pytest.mark.parametrize('stated, told', [((40, 30), 0), ((30, 40), 1), ((41, 30), 1)])
def test_a_size_that_the_annotations_do_not_state(tmp_path, instances, monkeypatch, stated, told):
    monkeypatch.setattr('mmhybrid.datasets.loading.pipeline_guard._told', set())
    lines = []
    monkeypatch.setattr('mmhybrid.datasets.loading.pipeline_guard.print_log',
                        lambda text, **kwargs: lines.append(text))
    cfg = instances()
    content = json.loads((tmp_path / 'a.json').read_text())
    for image in content['images']:
        image.update(width=stated[0], height=stated[1])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    dataset = DATASETS.build(cfg)
    [dataset[index] for index in range(4)]
    assert len(lines) == told
    assert not told or '0.png is 40 x 30 as it is read' in lines[0] or stated == (41, 30)


# --- wrappers that do not fit ------------------------------------------------------------------

@pytest.mark.parametrize('wrapper', [
    lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
    lambda inner: dict(type='ConcatDataset', datasets=[inner, inner])], ids=['repeat', 'concat'])
def test_class_balance(instances, wrapper):
    outside = dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=wrapper(instances()))
    with pytest.raises(Exception) as error:
        DATASETS.build(outside)[0]
    text = explain(error.value) or ''
    assert 'ClassBalancedDataset needs' in text or 'concat' in repr(wrapper), repr(error.value)
    inside = wrapper(dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=instances()))
    assert DATASETS.build(inside)[0]['img'].shape == (30, 40, 3)


@pytest.mark.parametrize('name', ['Mosaic', 'MixUp'])
def test_mixes_with_masks(tmp_path, instances, name):
    step = dict(type=name, img_scale=(64, 64))
    with pytest.raises(UserError) as error:
        mixed(instances(True), step)[0]
    assert f'{name} moves boxes, but not masks' in str(error.value)
    assert '(with_mask=False, and no mask head), or use CopyPaste' in str(error.value)
    assert mixed(instances(False), step)[0]['gt_bboxes'].shape[1] == 4
    assert len(mixed(instances(True), dict(type='CopyPaste'))[0]['gt_masks']) >= 1


# --- limits of the machine ---------------------------------------------------------------------

class Fate(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if self.kind == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == 'numpy':
            np.zeros(1 << 50)
        if self.kind == 'torch':
            torch.zeros(1 << 50)
        if self.kind == 'bytes':
            bytearray(1 << 60)
        if self.kind == 'files':
            resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
            return [open(os.devnull) for _ in range(99)]
        return index


@pytest.mark.plain_empty
@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind, words', [
    ('killed', 'A data loading worker was killed, usually because memory ran out'),
    ('numpy', 'The memory of the machine is used up'),
    ('torch', 'The memory of the machine is used up'),
    ('bytes', 'The memory of the machine is used up'),
    ('files', 'Too many files are open at once. Raise the limit (ulimit -n 65536)')])
def test_limits(kind, words, workers):
    if not workers and kind in ('killed', 'files'):
        pytest.skip('would end or cripple this process')
    with pytest.raises(Exception) as error:
        list(DataLoader(Fate(kind), num_workers=workers))
    text = explain(error.value)
    assert text.startswith(words) and len(text.splitlines()) <= 2, text
    del error
    gc.collect()  # ends the worker while the time to wait for it is short


@pytest.fixture
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_for_files(tmp_path, small_files):
    with pytest.raises(OSError) as error:
        (tmp_path / 'a').write_bytes(bytes(40_000))
    assert 'ulimit -f unlimited' in explain(error.value)
    with pytest.raises((RuntimeError, OSError)) as error:
        torch.save(torch.zeros(100_000), tmp_path / 'a.pth')
    assert 'ulimit -f unlimited' in explain(error.value)


@pytest.mark.parametrize('text, words', [
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
     'workers are out of shared memory.', '--shm-size'),
    ('DataLoader worker (pid 7) is killed by signal: Killed.', 'worker was killed'),
    ('unable to open shared memory object </torch_7> in read-write mode', '--shm-size'),
    ('unable to write to file </torch_7_1>', '--shm-size'),
    ('received 0 items of ancdata', 'ulimit -n'),
    ('OpenCV(4.12.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes in '
     "function 'OutOfMemoryError'", 'memory of the machine'),
    ('[Errno 12] Cannot allocate memory', 'memory of the machine')])
def test_what_others_call_it(text, words):
    assert words in explain(RuntimeError(text)) and text in explain(RuntimeError(text))


@pytest.mark.parametrize('text', [
    'PytorchStreamReader failed reading zip archive', 'worker is not what it was', 'memory'])
def test_other_errors_are_left_alone(text):
    assert explain(RuntimeError(text)) is None
