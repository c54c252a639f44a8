"""``mmhybrid init`` writes a folder whose config trains as it is."""
import argparse
import errno
import hashlib
import json
import os
import time
from pathlib import Path

import exports
import pytest
import small_runs
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from shrink import on_meta

from mmhybrid import cli
from mmhybrid.cli.actions.train_options import apply_options
from mmhybrid.cli.actions.training import parse, train, training_parser
from mmhybrid.datasets.exports import preparing
from mmhybrid.engine.config import load_config
from mmhybrid.errors import UserError
from mmhybrid.starter.heads import HEADS
from mmhybrid.starter.models import backbone_names, find_backbone

FEW = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
       'val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False']


def init(folder, *options):
    """Run the command; returns the config that it wrote."""
    command = cli.command('init')
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(folder), *map(str, options)])
    command.run(args)
    out = Path(args.out) if args.out else folder / 'mmhybrid'
    return next(out.glob('*.py'))


def state(folder):
    """Content and time of everything below a folder."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.md5(
        path.read_bytes()).hexdigest() if path.is_file() else '') for path in folder.rglob('*')}


FORMS = {
    'yolo': (exports.yolo, {}, ()),
    'colours': (exports.masks, dict(kind='labelmap'), ()),
    **{name: pytest.param(make, options, given, marks=pytest.mark.slow)
       for name, (make, options, given) in {
           'yolo outlines': (exports.yolo, dict(outlines=True), ()),
           'yolo split': (exports.yolo, dict(split=True), ()),
           'coco': (exports.coco, {}, ()),
           'coco boxes': (exports.coco, dict(kind='boxes'), ()),
           'coco to labels': (exports.coco, {}, ('--task', 'semantic')),
           'cvat brush': (exports.coco, dict(kind='cvat'), ('--crowd', 'objects')),
           'label studio': (exports.coco, dict(kind='studio'), ()),
           'roboflow': (exports.coco, dict(kind='roboflow'), ()),
           'voc': (exports.voc, {}, ()),
           'labelme': (exports.labelme, {}, ()),
           'index': (exports.masks, {}, ('--yes',)),
           'palette': (exports.masks, dict(kind='palette'), ('--yes',)),
           'unnamed colours': (exports.masks, dict(kind='colours'), ('--yes',)),
           'binary': (exports.masks, dict(kind='binary'), ('--classes', 'ground,thing')),
       }.items()},
}


@pytest.mark.parametrize(('make', 'options', 'given'), FORMS.values(), ids=FORMS)
def test_the_config_trains_as_it_is(make, options, given, tmp_path):
    folder = make(tmp_path / 'my parts 2', **options)
    before = state(folder)
    config = init(folder, *given)
    assert config == folder / 'mmhybrid/my_parts_2.py'
    assert {name: value for name, value in state(folder).items()
            if not name.startswith('mmhybrid') and name in before and value[1]} == {
        name: value for name, value in before.items() if value[1]}
    length = 'max_iters=2' if 'Iter' in config.read_text() else 'max_epochs=1'
    with small_runs.quick():
        train([str(config), '--work-dir', str(tmp_path / 'work'), '--cfg-options',
               f'train_cfg.{length}', f'train_cfg.val_interval={length[-1]}',
               f'default_hooks.checkpoint.interval={length[-1]}', *FEW])
        assert list((tmp_path / 'work').glob('best_*.pth'))
        picture = next(path for path in folder.rglob('*scene_000.*')
                       if path.suffix in ('.jpg', '.png') and 'mmhybrid' not in path.parts)
        assert cli.main(['predict', str(picture), '--weights', str(tmp_path / 'work'), '--out',
                         str(tmp_path / 'found')]) == 0
    assert list((tmp_path / 'found/pictures').iterdir())
    page = (config.parent / 'report.html').read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 6


@pytest.mark.parametrize(('make', 'options', 'length'), [
    (exports.yolo, {}, dict(max_epochs=3)),
    (exports.masks, dict(kind='labelmap'), dict(max_iters=9))])  # 5 images by twos, three times
def test_options_of_train_fit_the_config(make, options, length, tmp_path):
    config = init(make(tmp_path, **options), '--model', 'mambavision-t')
    args = parse(training_parser(), [
        str(config), '--epochs', '3', '--batch', '2', '--accumulate', '2', '--image-size', '96',
        '--freeze', '1', '--ema', '--early-stop', '2'])
    cfg, _ = load_config(str(config))
    init_default_scope(cfg.default_scope)
    before = cfg.optim_wrapper.optimizer.lr / cfg.auto_scale_lr.base_batch_size
    images = len(DATASETS.build(cfg.train_dataloader.dataset))
    apply_options(cfg, args, 1)
    if 'max_iters' in length:
        length = dict(max_iters=-(-3 * images // 2))
    assert {key: cfg.train_cfg[key] for key in length} == length
    assert cfg.param_scheduler[1].end == [*length.values()][0]
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(before * 4)
    sizes = [step.get('crop_size') or step.get('scale') for step in cfg.train_dataloader.dataset
             .pipeline if step.get('crop_size') or step.get('scale')]
    assert max(sizes[-1]) == 96
    assert [hook['type'] for hook in cfg.custom_hooks[-2:]] == ['EMAHook',
                                                                'mmhybrid.EarlyStopHook']
    with on_meta():
        model = MODELS.build(cfg.model)
    stages = [any(p.requires_grad for p in stage.parameters()) for stage in model.backbone.stages]
    assert stages == [False, True, True, True]


def one_step(config):
    """A training step and a prediction, on a CPU."""
    cfg, _ = load_config(str(config))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    data = DATASETS.build(cfg.train_dataloader.dataset)
    model.train()
    batch = model.data_preprocessor(pseudo_collate([data[0], data[1]]), True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    model.eval()
    data = DATASETS.build(cfg.val_dataloader.dataset)
    with torch.no_grad():
        return loss, model, model.val_step(pseudo_collate([data[0]]))[0]


PAIRS = [(head.name, task) for head in HEADS.values() for task in head.tasks]


@pytest.mark.parametrize(('head', 'task'), [
    pair if pair in (('rtmdet', 'detect'), ('segformer', 'semantic'))
    else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS])
def test_heads_learn_and_predict(head, task, tmp_path):
    config = init(exports.coco(tmp_path, 4), '--head', head, '--task', task, '--model',
                  'mambavision-mini')
    loss, model, sample = one_step(config)
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.backbone.stages[0].parameters())
    if task == 'semantic':
        assert sample.pred_sem_seg.shape == sample.gt_sem_seg.shape
    else:
        assert sample.pred_instances.bboxes.shape[1] == 4
        assert ('masks' in sample.pred_instances) == (task == 'instance')


@pytest.mark.slow
@pytest.mark.parametrize('model', ['mambavision-t', 'vmamba-t', 'localvmamba-t', 'vim-t',
                                   'localvim-t', 'timm:convnext_atto'])
def test_backbones_learn_and_predict(model, tmp_path):
    loss, built, _ = one_step(init(exports.coco(tmp_path, 4), '--model', model))
    assert torch.isfinite(loss)


@pytest.mark.parametrize('name', [name for name in backbone_names() if '-t' in name])
def test_backbones_have_the_channels_that_are_written(name):
    found = find_backbone(name)
    with on_meta():
        built = MODELS.build(dict(type=f'mmhybrid.{found.family}', arch=found.arch))
    assert tuple(built.out_channels) == found.channels


# --- what is refused ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def boxes(tmp_path_factory):
    return exports.yolo(tmp_path_factory.mktemp('boxes'))


@pytest.mark.parametrize(('options', 'parts'), [
    (('--model', 'mambavision-x'), ('--model mambavision-x', 'mambavision-')),
    (('--model', 'timm:nonsense'), ('timm:nonsense',)),
    (('--model', 'timm:vit_tiny_patch16_224'), ('timm:vit_tiny_patch16_224',)),
    (('--head', 'yolov8'), ('--head yolov8', 'faster', 'dino')),
    (('--head', 'upernet'), ('--task detect', 'upernet learns semantic')),
    (('--head', 'mask-rcnn'), ('--task detect', 'faster')),
    (('--model', 'vim-t', '--head', 'dino'), ('vim-t', 'four')),
    (('--task', 'instance'), ('boxes only', '--task detect')),
    (('--task', 'semantic'), ('boxes only',)),
    (('--weights', 'absent.pth'), ('absent.pth', 'neither a file')),
    (('--weights', 'vmamba-t-s1l8', '--model', 'mambavision-t'), ('VMamba', 'MambaVision')),
    (('--weights', 'localvim-s'), ('never published',)),
    (('--val-fraction', '1'), ('--val-fraction is 1',)),
    (('--seed', '-1'), ('--seed is -1',)),
    (('--group', ''), ('--group is empty',)),
    (('--format', 'voc'), ('--format voc', 'yolo')),
])
def test_wrong_options_are_named(options, parts, boxes):
    with pytest.raises(UserError) as error:
        init(boxes, *options)
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert not (boxes / 'mmhybrid').exists()


def test_twice_changes_nothing(tmp_path, capsys):
    folder = exports.yolo(tmp_path)
    config = init(folder)
    config.write_text(config.read_text() + '# edited\n')
    before = state(folder)
    init(folder)
    assert state(folder) == before
    assert 'nothing was changed' in capsys.readouterr().err
    with pytest.raises(UserError, match='(?s)seed differ.*edited.*--out'):
        init(folder, '--seed', '3')
    assert state(folder) == before
    init(folder, '--seed', '3', '--out', tmp_path / 'second')
    (folder / 'labels/scene_000.txt').write_text('')
    with pytest.raises(UserError, match='data differ'):
        init(folder)


def test_a_folder_of_somebody_else_stays(tmp_path):
    folder = exports.yolo(tmp_path / 'data')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').write_text('x')
    with pytest.raises(UserError, match='was not made by mmhybrid init'):
        init(folder, '--out', tmp_path / 'mine')
    with pytest.raises(UserError, match='is the data folder itself'):
        init(folder, '--out', folder)
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['notes.txt']


@pytest.mark.parametrize('name', ['report.html', 'train.json', 'mmhybrid_init.json'])
def test_a_full_disk_leaves_nothing(name, tmp_path, monkeypatch):
    folder = exports.yolo(tmp_path)
    before = set(state(folder))
    write = Path.write_text

    def full(self, text, *args, **kwargs):
        if self.name == name:
            write(self, text[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(UserError, match='could not be written: No space left.*--out'):
        init(folder)
    assert set(state(folder)) == before


def test_a_stopped_run_leaves_nothing_and_a_killed_one_is_cleared(tmp_path, monkeypatch):
    folder = exports.yolo(tmp_path)
    before = set(state(folder))

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('mmhybrid.cli.actions.init.write', stop)
        init(folder)
    assert set(state(folder)) == before
    for name, age in (('.mmhybrid.killed', 7200), ('.mmhybrid.working', 10)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    init(folder)
    assert not (folder / '.mmhybrid.killed').exists()
    assert (folder / '.mmhybrid.working').exists()


def test_of_two_at_once_the_first_stays(tmp_path, monkeypatch):
    folder = exports.yolo(tmp_path)
    once = iter([True])

    def meanwhile(prepared, work, progress):
        if next(once, False):
            init(folder, '--seed', '7')
        preparing.write(prepared, work, progress)

    monkeypatch.setattr('mmhybrid.cli.actions.init.write', meanwhile)
    with pytest.raises(UserError, match='was made from something else'):
        init(folder)
    assert json.loads((folder / 'mmhybrid/mmhybrid_init.json').read_text())['seed'] == 7
    assert not list(folder.glob('.mmhybrid*'))


def test_numbered_series_are_pointed_out(tmp_path, capsys):
    folder = exports.yolo(tmp_path, 16)
    for path in sorted(folder.rglob('scene_*')):
        number = int(path.stem[-3:])
        path.rename(path.with_name(f'video{"ab"[number % 2]}_{number}{path.suffix}'))
    init(folder)
    assert "--group '(.*?)\\d+\\.'" in capsys.readouterr().err
    init(folder, '--out', tmp_path / 'grouped', '--group', r'(.*?)\d+\.')
    listed = json.loads((tmp_path / 'grouped/val.json').read_text())['images']
    assert len({image['file_name'][:13] for image in listed}) == 1


def test_weights_choose_the_backbone_and_say_their_licence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('mmhybrid.cli.actions.init._size_of', lambda address: '123 MB')
    config = init(exports.yolo(tmp_path), '--weights', 'vmamba-t-s1l8')
    text = config.read_text()
    assert "type='mmhybrid.VMamba'" in text and "pretrained = 'vmamba-t-s1l8'" in text
    assert 'licence MIT, 123 MB' in capsys.readouterr().err


def test_a_file_of_weights_chooses_the_backbone(tmp_path, monkeypatch):
    with on_meta():
        built = MODELS.build(dict(type='mmhybrid.Vim', arch='tiny'))
    torch.save(dict(model={name: torch.zeros(tensor.shape) for name, tensor in
                           built.state_dict().items()}), tmp_path / 'mine.pth')
    monkeypatch.chdir(tmp_path)
    text = init(exports.yolo(tmp_path / 'data'), '--weights', 'mine.pth').read_text()
    assert "type='mmhybrid.Vim', arch='tiny'" in text
    assert f"pretrained = '{tmp_path / 'mine.pth'}'" in text
    with pytest.raises(UserError, match='(?s)mine.pth are of Vim.*MambaVision'):
        init(tmp_path / 'data', '--weights', 'mine.pth', '--model', 'mambavision-t')
    (tmp_path / 'mine.pth').write_bytes(b'no weights')
    with pytest.raises(UserError, match='--weights: mine.pth'):
        init(tmp_path / 'data', '--weights', 'mine.pth')


def test_few_pictures_with_weights_keep_batchnorm(tmp_path, monkeypatch):
    monkeypatch.setattr('mmhybrid.cli.actions.init._size_of', lambda address: '123 MB')
    text = init(exports.yolo(tmp_path), '--weights', 'mambavision-t-1k').read_text()
    assert 'norm_eval=True' in text and 'mask_head=None' in text and 'scale=(160, 160)' in text


def test_with_a_gpu_the_batch_is_one_that_is_predicted_to_fit(tmp_path, monkeypatch, capsys):
    asked = []

    def predicted(source, step, limit, most):
        asked.append((step.size, step.dtype, most, 20 * 2**30 < limit < 24 * 2**30))
        return 3

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr('mmhybrid.cli.actions.init.has_accelerator', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda _: argparse.Namespace(total_memory=24 * 2**30))
    monkeypatch.setattr('mmhybrid.cli.actions.init.predicted_batch', predicted)
    text = init(exports.yolo(tmp_path), '--model', 'mambavision-t').read_text()
    assert 'batch_size=3,' in text and 'base_batch_size=3' in text
    assert asked == [((160, 160), torch.float32, 4, True)]
    assert 'config: a batch of 3 is predicted to fit 24 GiB' in capsys.readouterr().err


def test_without_a_prediction_the_batch_is_what_it_was(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise UserError('x cannot run without data')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda _: argparse.Namespace(total_memory=24 * 2**30))
    monkeypatch.setattr('mmhybrid.cli.actions.init.predicted_batch', fails)
    text = init(exports.yolo(tmp_path), '--model', 'mambavision-t').read_text()
    assert 'batch_size=4,' in text
    assert 'the batch is a guess, because its memory could not be predicted: x cannot' in \
        capsys.readouterr().err
