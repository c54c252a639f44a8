"""Configs of classifiers: whole networks, recipes, published numbers, and tests of their files."""
import json
import math
import pickle
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load as load_file
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from PIL import Image
from released_files import FAMILIES, weights
from shrink import on_meta

from mmhybrid import cli
from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.datasets.loading import TimmTransform
from mmhybrid.datasets.loading.samplers import RepeatedAugmentSampler
from mmhybrid.layers import DropPath
from mmhybrid.weights import RELEASED

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'configs/classification'
ROWS = json.loads((ROOT / 'tests/data/classification.json').read_text())
CONFIGS = sorted(path for path in FOLDER.glob('*.py') if not re.search('mini|search', path.stem))
every_config = pytest.mark.parametrize('name', ROWS)
# Whole networks of the larger sizes are built in the slow run only.
every_model = pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * bool(
        re.search('_21k_|mambavision_l|s1l20|_b_|v0_s|stride8', name))) for name in ROWS])


def load(name):
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return cfg


@cache
def network(name):
    """The whole model on the meta device; shared between tests, so only look."""
    with on_meta():
        return MODELS.build(load(name).model)


def test_every_published_file_has_one_config_to_test_it_with():
    assert {path.stem for path in CONFIGS} == set(ROWS)
    tested = [row['weights'] for row in ROWS.values() if row['weights']]
    assert sorted(tested) == sorted(
        row.name for row in RELEASED.values() if row.kind == 'classification' and row.address)


@every_config
def test_a_config_says_only_its_difference(name):
    lines = (FOLDER / f'{name}.py').read_text().splitlines()
    statements = [line for line in lines if line.strip() and not line.startswith('#')]
    assert len(statements) < (40 if '_base_ = [' in lines else 18)
    short = ROWS[name]['weights']
    comment = ' '.join(line.removeprefix('# ') for line in lines if line.startswith('#'))
    assert re.findall(r'published weights: ([\w-]+)\b', comment) == ([short] if short else [])


@every_model
def test_the_network_is_the_published_one(name):
    cfg, row = load(name), ROWS[name]
    model = network(name)
    assert sum(p.numel() for p in model.parameters()) == row['parameters']
    backbone = cfg.model.backbone
    assert {key: backbone.get(key) for key in row['network']} == row['network']
    assert cfg.model.num_classes == 1000
    if row['weights']:
        published = RELEASED[row['weights']]
        assert backbone.type == f'mmhybrid.{published.family}Classifier'
        assert backbone.arch == published.arch
        if published.window_size:
            assert model.backbone.window_size[2:] == published.window_size[2:]
    family, _, listed = row['keys'].partition('/')
    if family == 'mambavision':
        entries = json.loads((ROOT / f'tests/data/{family}/keys/{listed}.json').read_text())
        official = {key: shape for key, shape, _ in entries['classification']}
    else:
        official = json.loads((ROOT / f'tests/data/{family}/keys.json').read_text())[listed]['keys']
    found = {key: list(tensor.shape) for key, tensor in model.backbone.state_dict().items()}
    assert found == official


@every_config
def test_it_is_tested_as_published(name):
    cfg = load(name)
    side, crop, mode = ROWS[name]['crop']
    for split in ('val', 'test'):
        step = cfg[f'{split}_dataloader'].dataset.pipeline[-1]
        assert (step.get('input_size', 224), step.crop_pct, step.interpolation) == (
            side, crop, 'bicubic')
        assert step.get('crop_mode', 'center') == mode and not step.get('is_training')
    assert cfg.train_dataloader.dataset.pipeline[-1].get('input_size', 224) == side
    assert cfg.test_evaluator == dict(type='mmhybrid.TopAccuracy', topk=(1, 5))


@every_config
def test_recipe(name):
    cfg, row = load(name), ROWS[name]
    wrapper, optimizer = cfg.optim_wrapper, cfg.optim_wrapper.optimizer
    assert optimizer.type.rpartition('.')[2] == row['optimizer']
    assert (optimizer.lr, tuple(optimizer.betas)) == (row['lr'], (0.9, 0.999))
    assert wrapper.get('clip_grad', {}).get('max_norm') == row['clip']
    assert wrapper.get('dtype') == row['amp']
    assert cfg.train_cfg.max_epochs == row['epochs']
    assert [cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size] == row['images']
    assert cfg.model.label_smoothing == 0.1
    assert cfg.model.mixing == dict(
        mixup_alpha=row['mixup'], cutmix_alpha=1.0, switch_prob=0.5)
    train = cfg.train_dataloader.dataset.pipeline[-1]
    assert (train.auto_augment, train.re_prob, train.re_mode, train.is_training) == (
        row['augment'], 0.25, 'pixel', True)
    first, *more = cfg.custom_hooks
    assert first.type == 'mmhybrid.RandomStateHook'
    assert [1 - hook.momentum for hook in more] == pytest.approx([row['ema']] if row['ema'] else [])
    assert cfg.train_dataloader.sampler.type.endswith('RepeatedAugmentSampler') == (
        name.startswith('vim'))
    assert cfg.get('published_checkpoint') == row['start']
    assert cfg.pretrained is None and cfg.load_from is None
    assert (optimizer.weight_decay, cfg.model.backbone.drop_path_rate) == (
        row['weight_decay'], row['drop_path'])


@every_model
def test_what_decays_and_what_is_dropped(name):
    cfg, row, model = load(name), ROWS[name], network(name)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(row['drop_path'])
    groups = build_optim_wrapper(model, _plain(cfg.optim_wrapper))
    decays = {id(p): group['weight_decay'] for group in groups.optimizer.param_groups
              for p in group['params']}
    exempt = ('.bias', 'pos_embed', 'cls_token') if row['optimizer'] == 'AdamW' else '.bias'
    for key, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or key.endswith(exempt)
        assert decays[id(parameter)] == (0.0 if spared else row['weight_decay']), key


def _plain(wrapper):
    """The wrapper without mixed precision, which a CPU cannot have."""
    kept = {key: value for key, value in wrapper.items() if key not in ('dtype', 'loss_scale')}
    return dict(kept, type='OptimWrapper')


def rates_of(cfg, per_epoch=2):
    """Learning rate of each iteration, stepped as mmengine's ParamSchedulerHook does it."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], cfg.optim_wrapper.optimizer.lr)
    schedules = []
    for given in cfg.param_scheduler:
        given = dict(given)
        cls = PARAM_SCHEDULERS.get(given.pop('type'))
        build = (cls.build_iter_from_epoch if given.pop('convert_to_iter_based', False) else
                 lambda epoch_length, _cls=cls, **more: _cls(**more))
        schedules.append(build(optimizer=optimizer, epoch_length=per_epoch, **given))
    found = []
    for _ in range(cfg.train_cfg.max_epochs):
        for _ in range(per_epoch):
            found.append(optimizer.param_groups[0]['lr'])
            [each.step() for each in schedules if not each.by_epoch]
        [each.step() for each in schedules if each.by_epoch]
    return np.array(found)


def cosine(top, floor, share):
    return floor + (top - floor) * (1 + np.cos(np.pi * share)) / 2


@pytest.mark.parametrize('name', [
    'mambavision_t_imagenet', 'mambavision_b_imagenet', 'vim_ti_imagenet', 'localvim_t_imagenet',
    'vmamba_t_imagenet', 'vim_ti_stride8_imagenet'])
def test_the_rate_is_the_published_one_in_every_epoch(name):
    cfg, row = load(name), ROWS[name]
    found, top = rates_of(cfg), row['lr']
    if row['warm_up'] is None:
        assert np.ptp(found) == 0 and found[0] == top
        return
    (start, epochs), (floor, length) = row['warm_up'], row['floor']
    warm = found[:2 * epochs]
    if name.startswith('vmamba'):  # steps with the iteration
        line = start + (top - start) * np.arange(2 * epochs) / (2 * epochs - 1)
    else:
        line = start + (top - start) * np.arange(epochs).repeat(2) / epochs
    late = np.arange(2 * epochs, 2 * row['epochs'])
    if name.startswith(('mambavision', 'vim')):  # timm's: per epoch, from the first one
        np.testing.assert_allclose(warm, line, rtol=0.035)  # the cosine is there already
        expected = cosine(top, floor, np.minimum(late // 2 / length, 1.0))
    else:
        np.testing.assert_allclose(warm, line, rtol=1e-6)
        expected = cosine(top, floor, (late - 2 * epochs) / (2 * length))
    np.testing.assert_allclose(found[2 * epochs:], expected, rtol=1e-4)


# --- the parts that these configs need -----------------------------------------------------------


@pytest.mark.parametrize('mode, size', [('center', (int(48 / 0.75), int(72 / 0.75))),
                                        ('squash', (64, 64))])
def test_crop_modes(mode, size):
    pixels = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = TimmTransform(48, crop_pct=0.75, crop_mode=mode)(
        dict(img=image, labels=0, img_path=''))['inputs']
    whole = np.asarray(image.resize(size[::-1], Image.BICUBIC))
    top, left = (size[0] - 48) // 2, (size[1] - 48) // 2
    part = torch.tensor(whole[top:top + 48, left:left + 48]).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found, (part - mean[:, None, None]) / std[:, None, None])


def test_an_unknown_crop_mode():
    with pytest.raises(ValueError, match="got crop_mode='sqash', expected 'center', 'squash'"):
        TimmTransform(crop_mode='sqash')


@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('length', [10, 12])
def test_repeated_augmentation(monkeypatch, world, length):
    def epoch(number):
        found = []
        for rank in range(world):
            monkeypatch.setattr('mmhybrid.datasets.loading.samplers.get_dist_info',
                                lambda rank=rank: (rank, world))
            sampler = RepeatedAugmentSampler(range(length), seed=4)
            sampler.set_epoch(number)
            found.append(list(sampler))
            assert len(found[-1]) == len(sampler) == math.ceil(length / world)
        return found

    first = epoch(0)
    assert first == epoch(0) != epoch(1)
    together = [index for step in zip(*first, strict=True) for index in step]
    # three in a row are the same image: one on each process, where there are three
    assert all(len(set(together[i:i + 3])) == 1 for i in range(0, len(together) - 2, 3))
    assert len(set(together)) == math.ceil(len(together) / 3)
    with pytest.raises(ValueError, match='got repeats=0, expected a positive integer'):
        RepeatedAugmentSampler(range(3), repeats=0)


# --- published files, tested ----------------------------------------------------------------------


CONFIG = """_base_ = {base!r}
model = dict(num_classes=3, mixing=None, backbone=dict(arch={arch!r}, {more}))
train_pipeline = [_base_.train_pipeline[0], dict(_base_.train_pipeline[1], input_size=32)]
test_pipeline = [_base_.test_pipeline[0], dict(_base_.test_pipeline[1], input_size=32)]
local = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline), **local)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline), **local)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2, val_interval=2)
"""
TOYS = {
    'MambaVision': ('mambavision_t_imagenet', ''), 'VMamba': ('vmamba_t_imagenet', ''),
    'Vim': ('vim_ti_imagenet', ''),
    'LocalVMamba': ('localvmamba_t_imagenet', "directions='unsearched'"),
    'LocalVim': ('localvim_t_imagenet', 'directions=[["h", "v", "h_flip", "v_flip"]] * 2')}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.RandomState(0)
    for split in ('train', 'val'):
        for name in 'abc':
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.randint(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    return folder


def toy_config(family, folder, images):
    base, more = TOYS[family]
    arch = dict(FAMILIES[family][2]['arch'], _delete_=True)
    path = folder / f'{family}.py'
    path.write_text(CONFIG.format(base=str(FOLDER / f'{base}.py'), arch=arch, more=more))
    return [str(path), '--data-root', str(images), '--work-dir', str(folder / 'w')]


@pytest.mark.parametrize('family, container', [
    ('VMamba', 'model'), ('LocalVim', 'state_dict'),
    pytest.param('MambaVision', 'state_dict', marks=pytest.mark.slow),
    pytest.param('Vim', 'model', marks=pytest.mark.slow),
    pytest.param('LocalVMamba', 'state_dict', marks=pytest.mark.slow)])
def test_a_file_as_published_is_tested(family, container, tmp_path, images):
    """The file has the network's own names; the model of the config has them behind a prefix."""
    argv = toy_config(family, tmp_path, images)
    state = {key: value.abs() if key.endswith('running_var') else value
             for key, value in weights(family).items()}
    torch.save({container: state}, tmp_path / 'published.pth')
    found = run_test([argv[0], str(tmp_path / 'published.pth'), *argv[1:],
                      '--out', str(tmp_path / 'all.pkl')])
    assert set(found) == {'accuracy/top1'}

    cfg = Config.fromfile(argv[0])
    net = MODELS.build(cfg.model).backbone.eval()
    net.load_state_dict(state, strict=False)
    transform = TimmTransform(32, crop_pct=cfg.test_pipeline[1].crop_pct)
    right = 0
    with torch.no_grad():
        for label, name in enumerate('abc'):
            for path in sorted((images / 'val' / name).iterdir()):
                image = transform(dict(img=Image.open(path), labels=0, img_path=''))['inputs']
                right += int(net(image[None]).argmax()) == label
    assert found['accuracy/top1'] == pytest.approx(100 * right / 6, abs=0.01)


def test_files_that_lack_something_are_refused(tmp_path, images, capfd):
    argv = toy_config('VMamba', tmp_path, images)
    path = tmp_path / 'file.pth'

    def refused(state):
        torch.save(dict(model=state), path)
        capfd.readouterr()
        assert run_command(run_test, [argv[0], str(path), *argv[1:]]) == 1
        error = capfd.readouterr().err
        assert 'Traceback' not in error
        return error

    state = weights('VMamba')
    del state['patch_embed.0.bias']
    error = refused(state)
    assert f'{path} lacks 1 tensors of VMambaClassifier' in error and 'patch_embed.0.bias' in error
    assert 'holds another family, MambaVision' in refused(weights('MambaVision'))
    backbone = {key: value for key, value in weights('VMamba').items() if 'classifier' not in key}
    assert 'tensors are not in the file' in refused(backbone)
    others = {key: value[:2] if 'classifier.head' in key else value
              for key, value in weights('VMamba').items()}
    assert 'is a classifier of 2 classes, expected 3; set num_classes=2' in refused(others)


def test_averaged_weights_of_a_file(tmp_path, images):
    """As the page says: plain weights are read, and the converter takes averaged ones."""
    argv = toy_config('VMamba', tmp_path, images)
    state = weights('VMamba')
    torch.save(dict(model={key: torch.full_like(value, torch.nan) for key, value in state.items()},
                    model_ema=state), tmp_path / 'both.pth')
    convert = ['convert', str(tmp_path / 'both.pth'), str(tmp_path / 'averaged.pth')]
    assert cli.main([*convert, '--key', 'model_ema']) == 0
    found = [run_test([argv[0], str(tmp_path / f'{name}.pth'), *argv[1:], '--out',
                       str(tmp_path / f'{name}.pkl')]) for name in ('both', 'averaged')]
    assert found[0] == {'accuracy/top1': 0.0}  # nan is right nowhere
    scores = pickle.loads((tmp_path / 'averaged.pkl').read_bytes())
    assert all(np.isfinite(sample['scores']).all() for sample in scores)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['MambaVision', 'Vim'])
def test_averages_and_order_go_on_where_they_were(family, tmp_path, images):
    argv = toy_config(family, tmp_path, images)
    options = ['--cfg-options', 'custom_hooks.1.momentum=0.5', 'randomness.seed=3']
    run_train([*argv, *options])
    run_train([*argv[:-1], str(tmp_path / 'again'), '--resume', str(tmp_path / 'w/epoch_1.pth'),
               *options])
    whole, resumed = (torch.load(tmp_path / f'{name}/epoch_2.pth', weights_only=False)
                      for name in ('w', 'again'))
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), (part, key)


@pytest.mark.parametrize('family', [
    'MambaVision', pytest.param('Vim', marks=pytest.mark.slow)])
def test_averaged_weights_are_what_is_tested(family, tmp_path, images):
    """LAMB, repeated augmentation and averages, from the config to a test of what was written."""
    argv = toy_config(family, tmp_path, images)
    run_train([*argv, '--cfg-options', 'custom_hooks.1.momentum=0.5'])
    path = tmp_path / 'w/epoch_2.pth'
    written = torch.load(path, weights_only=False)
    plain = {key.removeprefix('module.'): value
             for key, value in written['ema_state_dict'].items()}
    name = next(key for key in plain if key.endswith('out_proj.weight'))
    assert not torch.equal(plain[name], written['state_dict'][name])
    assert 0 <= run_test([argv[0], str(path), *argv[1:]])['accuracy/top1'] <= 100


# --- what is said about them ----------------------------------------------------------------------


def test_metafile_and_page_have_the_published_numbers():
    assert 'configs/classification/metafile.yml' in load_file(ROOT / 'model-index.yml')['Import']
    models = {model['Name']: model for model in load_file(FOLDER / 'metafile.yml')['Models']}
    assert set(models) == set(ROWS)
    lines = (FOLDER / 'README.md').read_text().splitlines()
    page = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines
            if line.startswith('|')][2:]
    assert len(page) == len(ROWS)
    for name, row in ROWS.items():
        model = models[name]
        assert model['Config'] == f'configs/classification/{name}.py'
        result, = model['Results']
        top1, top5 = row['published']
        assert result['Metrics'] == {
            'top-1': top1, **({'top-5': top5} if top5 is not None else {})}
        assert result['measured'] is False and re.match('README|paper', result['provenance'])
        assert model['Metadata']['Parameters'] == row['parameters']
        assert model['Metadata']['Epochs'] == row['epochs']
        assert model['Metadata']['Batch Size'] == row['images'][1]
        published = RELEASED.get(row['weights'])
        assert model.get('Weights') == (published and published.address)
        assert model.get('Weights License') == (published and published.license)
        _, parameters, crop, first, fifth, command = next(
            cells for cells in page if cells[-1].startswith(f'`{name}.py '))
        assert parameters == f'{row["parameters"]:,}'
        assert (first, fifth) == (str(top1), str(top5 or '-'))
        assert command == f'`{name}.py {row["weights"] or "FILE"}`'
        side, share, mode = row['crop']
        assert crop == (f'{math.floor(side / share)}{" squashed" * (mode == "squash")}, '
                        f'middle {side}')
