"""Every config: built in full, trained small, and checked against the published recipe."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from shrink import MANY_PARAMETERS, shrink

import mmhybrid  # noqa: F401
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
RECIPES = json.loads((ROOT / 'tests/data/recipes.json').read_text())
KEYS = ROOT / 'tests/data/mambavision/keys'

BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def load(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def by_name(paths):
    return [pytest.param(path, id=path.stem) for path in paths]


every_config = pytest.mark.parametrize('path', by_name(CONFIGS))
# The mini configs are our own: they have no published recipe to be equal to.
published_config = pytest.mark.parametrize(
    'path', by_name([path for path in CONFIGS if '_mini_' not in path.stem]))


def build_on_meta(cfg):
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@cache
def full_model(path):
    """The config's model as it is, on the meta device; shared between tests, so only look."""
    return build_on_meta(load(path))


# --- which files there are -----------------------------------------------------------------------


def test_the_promised_configs_exist():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        'mask_rcnn_mambavision_t_coco',
        *(f'cascade_mambavision_{size}_coco' for size in ('t', 's', 'b')),
        *(f'upernet_mambavision_{size}_ade20k' for size in ('t', 's', 'b', 'l3')),
    }


def test_every_published_config_has_a_recipe_to_be_checked_against():
    assert {path.stem for path in CONFIGS if '_mini_' not in path.stem} == set(RECIPES)


@published_config
def test_a_config_says_only_its_difference(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    statements = [line for line in lines if line and not line.startswith('#')]
    size_variant = any(line.startswith("_base_ = './") for line in lines)
    limit = 15 if size_variant else 36
    assert len(statements) < limit, f'{path.name} has {len(statements)} lines'


def test_nothing_is_inherited_from_another_package():
    # mmengine cannot resolve 'mmseg::' where the installed distribution has another name.
    for path in (ROOT / 'configs').rglob('*.py'):
        assert '::' not in path.read_text(), f'{path} inherits from an installed package'


@every_config
def test_every_config_has_what_the_tools_set(path):
    cfg = load(path)
    assert cfg.pretrained is None
    assert cfg.custom_imports.imports[0] == 'mmhybrid'
    assert cfg.custom_imports.allow_failed_imports is False
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16) or '_mini_' in path.stem
    assert cfg.auto_scale_lr.base_batch_size > 0
    assert cfg.model.backbone.type == 'mmhybrid.MambaVision'
    assert any(hook.type == 'mmhybrid.RandomStateHook' for hook in cfg.custom_hooks)
    assert 'init_cfg' not in cfg.model.backbone, 'a config must not load weights unasked'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == cfg.data_root
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if 'ann_file' in evaluator:
            assert evaluator.ann_file.startswith(cfg.data_root)


# --- the recipe ----------------------------------------------------------------------------------


@published_config
def test_recipe(path):
    cfg, expected = load(path), RECIPES[path.stem]

    assert cfg.model.backbone.arch == expected['arch']
    assert list(cfg.model.backbone.window_size) == expected['window_size']

    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW'
    assert optimizer.lr == pytest.approx(expected['lr'], rel=1e-12)
    assert optimizer.weight_decay == pytest.approx(expected['weight_decay'], rel=1e-12)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert cfg.optim_wrapper.constructor == 'mmhybrid.HybridOptimWrapperConstructor'
    assert cfg.optim_wrapper.paramwise_cfg == dict(no_decay='published')
    assert 'clip_grad' not in cfg.optim_wrapper
    if expected['amp']:
        assert cfg.optim_wrapper.type == 'mmhybrid.AmpOptimWrapper'
        assert cfg.optim_wrapper.dtype == 'float16'
        assert cfg.optim_wrapper.loss_scale == 'dynamic'
    else:
        assert cfg.optim_wrapper.type == 'OptimWrapper'
        assert set(cfg.optim_wrapper) == {'type', 'constructor', 'paramwise_cfg', 'optimizer'}

    warm_up, decay = cfg.param_scheduler
    assert [warm_up.type, warm_up.start_factor, warm_up.end] == expected['warm_up']
    if 'epochs' in expected:
        assert cfg.train_cfg.max_epochs == expected['epochs'] == decay.end
        assert (decay.type, decay.gamma) == ('MultiStepLR', 0.1)
        assert decay.milestones == expected['milestones']
        assert cfg.train_cfg.val_interval == 1
        assert cfg.default_hooks.checkpoint.interval == 1
    else:
        assert cfg.train_cfg.max_iters == expected['iterations'] == decay.end
        assert (decay.type, decay.power, decay.eta_min) == ('PolyLR', 1.0, 0.0)
        assert decay.begin == warm_up.end
        assert cfg.train_cfg.val_interval == expected['val_interval']
        crop = expected['crop']
        assert cfg.model.data_preprocessor.size == (crop, crop)
        assert sizes(cfg.train_dataloader, 'crop_size') == [(crop, crop)]
        assert sizes(cfg.train_dataloader, 'scale') == [(4 * crop, crop)]
        assert sizes(cfg.val_dataloader, 'scale') == [(4 * crop, crop)]
        assert sizes(cfg.test_dataloader, 'scale') == [(4 * crop, crop)]
        assert cfg.model.test_cfg.mode == 'whole'
        assert 'test_cfg' not in cfg.model.data_preprocessor, 'tests do not pad'

    per_device = cfg.train_dataloader.batch_size
    assert cfg.auto_scale_lr.base_batch_size == 8 * per_device == 16
    assert cfg.published_checkpoint.name == expected['backbone_file']
    assert cfg.published_checkpoint.url == (
        f'https://huggingface.co/nvidia/{expected["backbone_repository"]}/resolve/main/'
        f'{expected["backbone_file"]}')
    assert cfg.published_checkpoint.licence == 'CC-BY-NC-SA-4.0'


def test_multi_scale_training_sizes():
    cfg = load(ROOT / 'configs/cascade_mambavision_t_coco.py')
    plain, cropped = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert [scale[1] for scale in plain[0].scales] == list(range(480, 801, 32))
    assert cropped[2].scales == plain[0].scales
    assert [scale[1] for scale in cropped[0].scales] == [400, 500, 600]
    assert {scale[0] for scale in plain[0].scales + cropped[0].scales} == {1333}
    assert (cropped[1].crop_type, cropped[1].crop_size) == ('absolute_range', (384, 600))


def sizes(loader, key):
    return [step[key] for step in loader.dataset.pipeline if key in step]


# --- the whole model, without memory --------------------------------------------------------------


@every_config
def test_the_full_model_has_the_official_keys(path):
    state = full_model(path).state_dict()
    backbone = {name[len('backbone.'):]: tensor for name, tensor in state.items()
                if name.startswith('backbone.')}
    others = {name for name in state if not name.startswith('backbone.')}

    if '_mini_' in path.stem:
        # An arch and heads of our own: the same kinds of parameters, in other numbers.
        assert {pattern(name) for name in backbone} == {pattern(name) for name in dense_keys('T')}
        return
    if path.stem.startswith('cascade'):
        assert len(others) == 148
        assert others == cascade_head_keys()
    elif path.stem.startswith('mask_rcnn'):
        assert others == mask_rcnn_head_keys()
    else:
        assert others == upernet_head_keys()

    official = dense_keys(RECIPES[path.stem]['keys'])
    assert list(backbone) == list(official)
    assert {name: list(tensor.shape) for name, tensor in backbone.items()} == official


@published_config
def test_parameter_count(path):
    count = sum(p.numel() for p in full_model(path).parameters())
    assert count == RECIPES[path.stem]['parameters']


@every_config
def test_drop_path_really_is_what_the_published_models_used(path):
    cfg = load(path)
    backbone = full_model(path).backbone
    rates = [module.rate for module in backbone.modules() if type(module).__name__ == 'DropPath']
    if '_mini_' in path.stem:
        expected = cfg.model.backbone.get('drop_path_rate', 0.2)
    else:
        expected = 0.2
    assert max(rates, default=0.0) == pytest.approx(expected, abs=1e-6)
    assert rates == sorted(rates)


def test_a_changed_setting_changes_the_module():
    cfg = load(ROOT / 'configs/cascade_mambavision_t_coco.py')
    cfg.model.backbone.drop_path_rate = 0.4
    backbone = build_on_meta(cfg).backbone
    rates = [module.rate for module in backbone.modules() if type(module).__name__ == 'DropPath']
    assert max(rates) == pytest.approx(0.4, abs=1e-6)


def dense_keys(variant):
    listed = json.loads((KEYS / f'{variant}.json').read_text())['dense']
    return {name: shape for name, shape, _ in listed}


def pattern(name):
    return re.sub(r'\d+', 'N', name)


def conv(name):
    return {f'{name}.weight', f'{name}.bias'}


def conv_bn(name):
    return {f'{name}.conv.weight', *(f'{name}.bn.{part}' for part in BATCH_NORM)}


def fpn_and_rpn_keys():
    names = [f'neck.{kind}_convs.{i}.conv' for kind in ('lateral', 'fpn') for i in range(4)]
    names += [f'rpn_head.rpn_{part}' for part in ('conv', 'cls', 'reg')]
    return set().union(*map(conv, names))


def mask_head_keys(prefix):
    names = [f'{prefix}.convs.{i}.conv' for i in range(4)]
    return set().union(*map(conv, [*names, f'{prefix}.upsample', f'{prefix}.conv_logits']))


def cascade_head_keys():
    keys = fpn_and_rpn_keys()
    for stage in range(3):
        box = f'roi_head.bbox_head.{stage}'
        keys = keys.union(*(conv_bn(f'{box}.shared_convs.{i}') for i in range(4)))
        keys = keys.union(*(conv(f'{box}.{part}') for part in ('shared_fcs.0', 'fc_cls', 'fc_reg')))
        keys |= mask_head_keys(f'roi_head.mask_head.{stage}')
    return keys


def mask_rcnn_head_keys():
    box = ('shared_fcs.0', 'shared_fcs.1', 'fc_cls', 'fc_reg')
    keys = fpn_and_rpn_keys().union(*(conv(f'roi_head.bbox_head.{part}') for part in box))
    return keys | mask_head_keys('roi_head.mask_head')


def upernet_head_keys():
    names = [f'psp_modules.{i}.1' for i in range(4)] + ['bottleneck', 'fpn_bottleneck']
    names += [f'{kind}_convs.{i}' for kind in ('lateral', 'fpn') for i in range(3)]
    keys = set().union(*(conv_bn(f'decode_head.{name}') for name in names))
    keys |= conv('decode_head.conv_seg')
    return keys | conv_bn('auxiliary_head.convs.0') | conv('auxiliary_head.conv_seg')


# --- the small model, doing everything ------------------------------------------------------------


@every_config
def test_shrunk_it_trains_a_step_and_predicts(path):
    cfg = shrink(load(path))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert sum(p.numel() for p in model.parameters()) < MANY_PARAMETERS
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    make_batch = segmentation_batch if 'decode_head' in cfg.model else detection_batch

    model.train()
    with wrapper.optim_context(model):
        data = model.data_preprocessor(make_batch(cfg, training=True), True)
        loss, logged = model.parse_losses(model(**data, mode='loss'))
    assert torch.isfinite(loss), {name: float(value) for name, value in logged.items()}
    wrapper.backward(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f'{name} got no gradient'
        assert torch.isfinite(parameter.grad).all(), f'the gradient of {name} is not finite'
    stem = 'patch_embed.conv_down.0.weight'
    assert model.backbone.get_parameter(stem).grad.abs().max() > 0, 'no gradient at the stem'

    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    wrapper.step()
    moved = [name for name, p in model.backbone.named_parameters() if (p != before[name]).any()]
    assert stem in moved
    assert len(moved) > len(before) / 2
    assert all(torch.isfinite(p).all() for p in model.parameters())

    model.eval()
    with torch.no_grad():
        batch = make_batch(cfg, training=False)
        prediction, = model.test_step(batch)
    height, width = batch['data_samples'][0].ori_shape
    if 'decode_head' in cfg.model:
        labels = prediction.pred_sem_seg.data
        assert labels.shape == (1, height, width)
        assert 0 <= labels.min() and labels.max() < 150
    else:
        found = prediction.pred_instances
        assert len(found) > 0
        assert torch.isfinite(found.bboxes).all() and torch.isfinite(found.scores).all()
        assert found.masks.shape == (len(found), height, width)


@every_config
def test_weight_decay_of_the_groups_is_the_published_rule(path):
    cfg, model = load(path), full_model(path)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay_of = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups
                for p in group['params']}
    if cfg.optim_wrapper.paramwise_cfg.no_decay != 'published':
        pytest.fail('a config with another decay rule needs a check of its own here')
    trained = dict(model.named_parameters())
    assert len(decay_of) == len(trained)
    for name, parameter in trained.items():
        expected = 0.0 if 'norm' in name else cfg.optim_wrapper.optimizer.weight_decay
        assert decay_of[id(parameter)] == expected, name
    if path.stem == 'cascade_mambavision_t_coco':
        free = [name for name, p in trained.items() if decay_of[id(p)] == 0.0]
        assert (len(free), len(trained)) == (72, 335)


def detection_batch(cfg, training):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    # A test image comes in any size; a training image in one that shrink() sets.
    height, width = (96, 128) if training else (75, 101)
    generator = torch.Generator().manual_seed(1)
    inputs, samples = [], []
    for index in range(cfg.train_dataloader.batch_size if training else 1):
        inputs.append(
            torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        boxes = torch.tensor([[8.0, 8.0, 56.0, 60.0], [40.0, 20.0, 70.0, 68.0]])
        masks = np.zeros((2, height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        sample = DetDataSample(metainfo=dict(
            img_id=index, img_path='', img_shape=(height, width), ori_shape=(height, width),
            scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([3, 17]), masks=BitmapMasks(masks, height, width))
        sample.ignored_instances = InstanceData(
            bboxes=boxes.new_zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
            masks=BitmapMasks(masks[:0], height, width))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def segmentation_batch(cfg, training):
    from mmseg.structures import SegDataSample

    height, width = cfg.model.data_preprocessor.size if training else (61, 87)
    generator = torch.Generator().manual_seed(1)
    inputs, samples = [], []
    for _ in range(cfg.train_dataloader.batch_size if training else 1):
        inputs.append(
            torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        labels = torch.randint(0, 150, (1, height, width), generator=generator)
        labels[:, :4] = 255
        sample = SegDataSample(metainfo=dict(
            img_path='', img_shape=(height, width), ori_shape=(height, width),
            pad_shape=(height, width), scale_factor=(1.0, 1.0), flip=False))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


# --- the unshrunk pipelines on real files ---------------------------------------------------------


@pytest.fixture(scope='module')
def mini_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mini')
    write_mini_coco(folder / 'coco', train=2, val=1)
    write_mini_ade20k(folder / 'ade', train=2, val=1)
    return {'mmdet': f'{folder}/coco/', 'mmseg': f'{folder}/ade/'}


# A size variant has the data of the config it varies.
@pytest.mark.parametrize(
    'path', by_name([path for path in CONFIGS if '_base_/datasets/' in path.read_text()]))
def test_pipelines_run_as_they_are(path, mini_sets):
    cfg = load(path)
    test_scale = sizes(cfg.test_dataloader, 'scale')
    images = {}
    for split in ('train', 'val', 'test', 'tta'):
        dataset = cfg['test_dataloader' if split == 'tta' else f'{split}_dataloader'].dataset
        dataset.data_root = mini_sets[cfg.default_scope]
        if split == 'tta':
            dataset.pipeline = cfg.tta_pipeline
        built = DATASETS.build(dataset)
        assert len(built) == (2 if split == 'train' else 1)
        images[split] = built[0]

    assert images['train']['inputs'].dtype == torch.uint8
    assert images['val']['inputs'].shape == images['test']['inputs'].shape
    if 'roi_head' in cfg.model:
        assert len(images['train']['data_samples'].gt_instances) > 0
        assert len(images['train']['data_samples'].gt_instances.masks) > 0
        views = 2
    else:
        labels = images['train']['data_samples'].gt_sem_seg.data
        # A config may train on reduced labels, but image and labels keep one shape.
        height, width = images['train']['inputs'].shape[1:]
        assert height % labels.shape[1] == 0
        assert height * labels.shape[2] == width * labels.shape[1]
        assert set(labels.unique().tolist()) <= {*range(150), 255}
        # Scores are counted at the annotation's own size.
        sample = images['val']['data_samples']
        assert sample.gt_sem_seg.shape == sample.ori_shape
        views = 6 * 2
    assert len(images['tta']['inputs']) == views
    assert {sample.flip for sample in images['tta']['data_samples']} == {False, True}
    if test_scale:
        short, long = sorted(images['test']['inputs'].shape[1:])
        assert short == min(test_scale[0]) or long == max(test_scale[0])


# --- model-index.yml -----------------------------------------------------------------------------


def metafile_models():
    from mmengine.fileio import load as load_file

    index = load_file(ROOT / 'model-index.yml')
    return [model for path in index['Import'] for model in load_file(ROOT / path)['Models']]


def test_the_model_index_lists_every_published_config_once():
    listed = [model['Config'] for model in metafile_models()]
    assert sorted(listed) == [
        f'configs/{path.name}' for path in CONFIGS if '_mini_' not in path.stem]
    # mmengine looks a config up by what follows the first slash.
    assert [path.partition('/')[-1] for path in listed] == [Path(path).name for path in listed]


def test_the_model_index_claims_nothing_without_a_source():
    for model in metafile_models():
        assert model['Name'] == Path(model['Config']).stem
        expected = RECIPES[model['Name']]
        assert model['Metadata']['Parameters'] == expected['parameters']
        assert ('Weights' in model) == bool(model['Results'])
        if 'Weights' in model:
            stem = expected['released']
            assert model['Weights'] == (
                f'https://huggingface.co/nvidia/{stem}/resolve/main/{stem}.pth')
            assert model['Weights License'] == 'CC-BY-NC-SA-4.0'
        published = {}
        for result in model['Results']:
            assert result['measured'] is False
            assert result['provenance'].startswith(('log', 'README'))
            published.update(result['Metrics'])
        assert published == expected['published']


def test_mmengine_finds_a_config_and_its_weights_through_the_index(tmp_path):
    from mmengine.config.utils import _get_cfg_metainfo

    installed = tmp_path / '.mim'
    installed.mkdir()
    for name in ('configs', 'model-index.yml'):
        (installed / name).symlink_to(ROOT / name)
    for path in CONFIGS:
        if '_mini_' not in path.stem:
            found = _get_cfg_metainfo(str(tmp_path), path.name)
            assert found['Name'] == path.stem
            assert (installed / found['Config']).samefile(path)
