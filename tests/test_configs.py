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
from shrink import MANY_PARAMETERS, on_meta, shrink

import mmhybrid.plugin  # noqa: F401
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco
from mmhybrid.weights import RELEASED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
RECIPES = json.loads((ROOT / 'tests/data/recipes.json').read_text())
KEYS = ROOT / 'tests/data'

OURS = ('MambaVision', 'VMamba', 'LocalVMamba', 'LocalVim', 'Vim', 'TimmFeatures')
PEERS = ('SwinTransformer', 'VisionTransformer', 'ResNet', 'ResNetV1c')
# Of a size or a release whose like is trained in the default run.
LARGER = (r'(swin|convnext)_[sb]_|vmamba_(t_s2l5|v0_[sb]|v0_t_3x)_|deit_s_(vim|coco)|cascade_r101'
          r'|upernet_r50|vim_b_|decay07')
BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def load(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def by_name(paths):
    return [pytest.param(path, id=path.stem) for path in paths]


def built(paths):
    """For tests that build whole models: larger ones in the slow run only."""
    return [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * bool(
        re.search(LARGER, path.stem))) for path in paths]


every_config = pytest.mark.parametrize('path', by_name(CONFIGS))
every_model = pytest.mark.parametrize('path', built(CONFIGS))
# The mini and tight configs are our own: they have no published recipe to be equal to.
PUBLISHED = [path for path in CONFIGS if not re.search('_(mini|tight)_', path.stem)]
published_config = pytest.mark.parametrize('path', by_name(PUBLISHED))
published_model = pytest.mark.parametrize('path', built(PUBLISHED))


def build_on_meta(cfg):
    with on_meta():
        return MODELS.build(cfg.model)


@cache
def full_model(path):
    """The config's model as it is, on the meta device; shared between tests, so only look."""
    return build_on_meta(load(path))


# --- which files there are -----------------------------------------------------------------------


def test_the_promised_configs_exist():
    names = {path.stem for path in CONFIGS}
    sizes = {'mambavision': 'tsb', 'vmamba': 'tsb', 'localvmamba': 'ts', 'localvim': 'ts'}
    assert names >= {
        *(f'upernet_{family}_{size}_ade20k' for family in sizes for size in sizes[family]),
        *(f'mask_rcnn_{family}_{size}_coco' for family in sizes for size in sizes[family]
          if family != 'mambavision'),
        *(f'mask_rcnn_{name}_3x_coco' for name in (
            'vmamba_t', 'vmamba_s', 'localvmamba_t', 'localvmamba_s')),
        *(f'cascade_mambavision_{size}_coco' for size in 'tsb'),
        'upernet_mambavision_l3_ade20k', 'mask_rcnn_mambavision_t_coco',
        *(f'cascade_{family}_t_coco' for family in ('vmamba', 'localvmamba', 'localvim')),
        'cascade_vim_ti_coco', 'cascade_vim_s_coco', 'mask_rcnn_vim_ti_coco',
        'upernet_vim_ti_ade20k', 'upernet_vim_s_ade20k',
        *(f'{heads}_t_{data}' for peer in ('swin', 'convnext') for heads, data in (
            (f'mask_rcnn_{peer}', 'coco'), (f'cascade_{peer}', 'coco'),
            (f'upernet_{peer}', 'ade20k'))),
        'upernet_deit_s_ade20k', 'mask_rcnn_r50_coco', 'upernet_r101_ade20k',
        *(f'{heads}_{peer}_{size}_{data}' for peer, sizes in (
            ('swin', 'sb'), ('convnext', 'sb')) for size in sizes for heads, data in (
            ('cascade', 'coco'), ('upernet', 'ade20k'))),
        'cascade_r50_coco', 'cascade_r101_coco', 'upernet_r50_ade20k',
        *(f'cascade_deit_{size}_coco' for size in ('ti', 's')),
        *(f'upernet_deit_{size}_vim_ade20k' for size in ('ti', 's')),
        *(f'{heads}_vmamba_{size}_{data}' for size in ('t_s2l5', 'v0_t', 'v0_s', 'v0_b')
          for heads, data in (('mask_rcnn', 'coco'), ('upernet', 'ade20k'))),
        *(f'mask_rcnn_vmamba_{size}_3x_coco' for size in ('t_s2l5', 'v0_t', 'v0_s')),
        'cascade_vim_b_coco', 'cascade_vim_ti_decay07_coco',
    }


def test_every_published_config_has_a_recipe_to_be_checked_against():
    assert {path.stem for path in PUBLISHED} == set(RECIPES)


@published_config
def test_a_config_says_only_its_difference(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    statements = [line for line in lines if line and not line.startswith('#')]
    size_variant = any(line.startswith("_base_ = './") for line in lines)
    limit = 20 if size_variant else 36
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
    assert cfg.auto_scale_lr.base_batch_size > 0 and not cfg.auto_scale_lr.enable
    scope, _, backbone = cfg.model.backbone.type.partition('.')
    assert backbone in PEERS if scope != 'mmhybrid' else backbone in OURS
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

    backbone = json.loads(json.dumps(cfg.model.backbone.to_dict()))
    assert {key: backbone[key] for key in expected['backbone']} == expected['backbone']

    wrapper, optimizer = cfg.optim_wrapper, cfg.optim_wrapper.optimizer
    assert optimizer.type == expected['optimizer']
    assert optimizer.lr == pytest.approx(expected['lr'], rel=1e-12)
    assert optimizer.weight_decay == pytest.approx(expected['weight_decay'], rel=1e-12)
    if optimizer.type == 'AdamW':
        assert tuple(optimizer.betas) == (0.9, 0.999)
    else:
        assert optimizer.momentum == 0.9
    assert wrapper.constructor == 'mmhybrid.HybridOptimWrapperConstructor'
    paramwise = wrapper.paramwise_cfg
    assert paramwise.get('no_decay') == expected['no_decay']
    assert paramwise.get('layer_decay') == expected['layer_decay']
    custom = {name: [setting.get('lr_mult'), setting.get('decay_mult')]
              for name, setting in paramwise.get('custom_keys', {}).items()}
    assert custom == {name: pytest.approx(pair) for name, pair in expected['custom'].items()}
    assert wrapper.get('clip_grad', {}).get('max_norm') == expected['clip']
    assert expected['amp'] in (None, 'float16')
    if wrapper.type == 'OptimWrapper':
        assert expected['amp'] is None
        assert set(wrapper) == {'type', 'constructor', 'paramwise_cfg', 'optimizer'}
    else:
        assert wrapper.type == 'mmhybrid.AmpOptimWrapper'
        assert wrapper.dtype == expected['amp']
        assert wrapper.loss_scale == 'dynamic'

    *warm_up, decay = cfg.param_scheduler
    assert [[part.type, part.start_factor, part.end] for part in warm_up] == (
        [expected['warm_up']] if expected['warm_up'] else [])
    assert all(part.by_epoch is False and part.begin == 0 for part in warm_up)
    if 'epochs' in expected:
        assert cfg.train_cfg.max_epochs == expected['epochs'] == decay.end
        assert cfg.train_cfg.val_interval == 1
        assert cfg.default_hooks.checkpoint.interval == 1
        assert decay.by_epoch
    else:
        assert cfg.train_cfg.max_iters == expected['iterations'] == decay.end
        assert cfg.train_cfg.val_interval == expected['val_interval']
        assert not (decay.by_epoch or cfg.default_hooks.checkpoint.by_epoch
                    or cfg.log_processor.by_epoch)
        assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
        assert cfg.train_dataloader.get('batch_sampler') is None
    if 'milestones' in expected:
        assert (decay.type, decay.gamma) == ('MultiStepLR', 0.1)
        assert decay.milestones == expected['milestones']
    else:
        assert [decay.type, decay.power, decay.eta_min] == ['PolyLR', *expected['power']]
        assert decay.begin == (expected['warm_up'][2] if warm_up else 0)
    if 'crop' in expected:
        crop = expected['crop']
        assert cfg.model.data_preprocessor.size == (crop, crop)
        assert sizes(cfg.train_dataloader, 'crop_size') == [(crop, crop)]
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert sizes(loader, 'scale') == [(4 * crop, crop)]
        assert cfg.model.test_cfg == dict(mode='whole') if expected['test'] == 'whole' else dict(
            mode='slide', crop_size=(512, 512), stride=(341, 341))
        assert 'test_cfg' not in cfg.model.data_preprocessor, 'tests do not pad'

    assert [cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size] == (
        expected['images'])
    if expected['start']:
        assert RELEASED[expected['start']].family == backbone['type'].partition('.')[2]
    assert cfg.get('published_checkpoint') == expected['start']


@pytest.mark.parametrize('name', ['cascade_vim_ti_coco', 'mask_rcnn_localvim_t_coco'])
def test_large_scale_jittering(name):
    cfg = load(ROOT / f'configs/{name}.py')
    assert cfg.train_cfg.dynamic_intervals == [(180001, 184375)], 'the end is validated, too'
    # detectron2 leaves no small image out
    assert cfg.train_dataloader.dataset.filter_cfg == dict(
        filter_empty_gt=True, min_size=32 if 'localvim' in name else 0)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (steps['RandomResize'].scale, steps['RandomResize'].ratio_range) == (
        (1024, 1024), (0.1, 2.0))
    assert steps['RandomCrop'].crop_size == (1024, 1024) and steps['RandomCrop'].recompute_bbox
    assert steps['FilterAnnotations'].min_gt_bbox_wh == (0.01, 0.01)
    assert sizes(cfg.test_dataloader, 'scale') == [(1024, 1024)]
    # The preprocessor pads, LocalVim's in grey; a step that does it would hide the image's shape.
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        assert all(step.type != 'Pad' for step in loader.dataset.pipeline)
    padding = cfg.model.data_preprocessor
    assert padding.pad_size_divisor == 1024
    assert padding.get('pad_colour') == ((114, 114, 114) if 'localvim' in name else None)


@pytest.mark.parametrize('path', by_name([
    path for path in CONFIGS if re.match('cascade_(localvim|vim|deit)_(?!mini_)', path.stem)]))
def test_the_cascade_of_vitdet(path):
    model = load(path).model
    assert model.roi_head.type == 'mmhybrid.OneMaskCascadeRoIHead'
    assert model.roi_head.stage_loss_weights == [1, 1, 1]
    stages = model.train_cfg.rcnn
    assert [stage.assigner.pos_iou_thr for stage in stages] == [0.5, 0.6, 0.7]
    assert [stage.sampler.type for stage in stages] == [
        'RandomSampler', 'PseudoSampler', 'PseudoSampler']
    assert stages[0].sampler.num == 512 and stages[0].sampler.pos_fraction == 0.25
    heads = model.roi_head.bbox_head
    assert [[round(1 / std) for std in head.bbox_coder.target_stds] for head in heads] == [
        [10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]]
    assert all(head.reg_class_agnostic and head.loss_bbox.type == 'L1Loss' for head in heads)
    assert model.rpn_head.num_convs == 2 and model.rpn_head.loss_bbox.type == 'L1Loss'
    assert model.train_cfg.rpn.allowed_border == -1
    assert model.train_cfg.rpn_proposal.max_per_img == 1000
    assert all(head.norm_cfg == dict(type='LN2d', eps=1e-6)
               for head in (*heads, model.roi_head.mask_head))


def test_multi_scale_training_sizes():
    cfg = load(ROOT / 'configs/cascade_mambavision_t_coco.py')
    plain, cropped = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert [scale[1] for scale in plain[0].scales] == list(range(480, 801, 32))
    assert cropped[2].scales == plain[0].scales
    assert [scale[1] for scale in cropped[0].scales] == [400, 500, 600]
    assert {scale[0] for scale in plain[0].scales + cropped[0].scales} == {1333}
    assert (cropped[1].crop_type, cropped[1].crop_size) == ('absolute_range', (384, 600))
    assert cropped[1].allow_negative_crop
    flip = cfg.train_dataloader.dataset.pipeline[2]
    assert (flip.type, flip.prob) == ('RandomFlip', 0.5)


# What our base files set otherwise than those that mmdet and mmseg ship; a star is every stage.
DIFFERENCES = {
    'models/mask_rcnn.py': ('mmdet', 'models/mask-rcnn_r50_fpn.py', {}),
    'models/cascade_mask_rcnn.py': ('mmdet', 'models/cascade-mask-rcnn_r50_fpn.py', {
        f'model.roi_head.bbox_head.*.{key}': value for key, value in {
            'type': 'ConvFCBBoxHead', 'num_shared_convs': 4, 'num_shared_fcs': 1,
            'conv_out_channels': 256, 'norm_cfg.type': 'SyncBN', 'norm_cfg.requires_grad': True,
            'reg_class_agnostic': False, 'reg_decoded_bbox': True, 'loss_bbox.type': 'GIoULoss',
            'loss_bbox.loss_weight': 10.0, 'loss_bbox.beta': None}.items()}),
    'models/upernet.py': ('mmseg', 'models/upernet_swin.py', {
        'model.decode_head.num_classes': 150, 'model.auxiliary_head.num_classes': 150,
        'model.data_preprocessor.size': (512, 512)}),
    'datasets/coco_instance.py': ('mmdet', 'datasets/coco_instance.py', {}),
    'datasets/ade20k.py': ('mmseg', 'datasets/ade20k.py', {'train_dataloader.batch_size': 2}),
    'datasets/ade20k_640.py': ('mmseg', 'datasets/ade20k_640x640.py', {
        'train_dataloader.batch_size': 2}),
}


@pytest.mark.parametrize('name', DIFFERENCES)
def test_heads_and_data_are_those_of_the_toolkits(name):
    from importlib.util import find_spec

    package, theirs, expected = DIFFERENCES[name]
    folder = Path(find_spec(package).origin).parent / '.mim/configs/_base_'
    ours, theirs = (settings(Config.fromfile(path)) for path in (
        ROOT / 'configs/_base_' / name, folder / theirs))
    found = {key: ours.get(key) for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    starred = {re.sub(r'(bbox_head)\.\d', r'\1.*', key): value for key, value in found.items()}
    assert starred == expected
    assert len(found) == len(expected) * (3 if '*' in ''.join(expected) else 1)


def settings(cfg):
    """Every value that does not depend on the backbone or the machine, by its place."""
    found = {}

    def walk(node, place):
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(
            node, (list, tuple)) and any(isinstance(item, dict) for item in node) else None
        if pairs is None:
            found[place] = tuple(node) if isinstance(node, list) else node
        for key, value in pairs or ():
            if key == 'reduce_zero_label' and value is True:
                continue  # ADE20KDataset says it itself
            if key not in ('backbone', 'in_channels', 'pretrained', 'backend_args', 'data_root'):
                walk(value, f'{place}.{key}' if place else str(key))

    walk({key: cfg[key] for key in cfg if key == 'model' or key.endswith(
        ('_dataloader', '_evaluator'))}, '')
    assert len(found) > 20
    return found


def sizes(loader, key):
    return [step[key] for step in loader.dataset.pipeline if key in step]


# --- the whole model, without memory --------------------------------------------------------------


@every_model
def test_the_full_model_has_the_official_keys(path):
    state = {name: list(tensor.shape) for name, tensor in full_model(path).state_dict().items()}
    backbone = {name[len('backbone.'):]: shape for name, shape in state.items()
                if name.startswith('backbone.')}
    others = {name for name in state if not name.startswith('backbone.')}

    if path not in PUBLISHED:
        # An arch and heads of our own: the same kinds of parameters, in other numbers.
        family = load(path).model.backbone.type.partition('.')[2]
        known = {pattern(name) for listed in MINI_KEYS[family] for name in official_keys(listed)}
        found = {pattern(name) for name in backbone}
        assert found <= known and len(found) > len(known) / 2
        return
    if path.stem == 'cascade_vim_ti_coco':
        assert len(state) == 523
    elif re.match('cascade_(localvim|vim|deit)_', path.stem):
        like = full_model(ROOT / 'configs/cascade_vim_ti_coco.py').state_dict()
        assert others == {name for name in like if not name.startswith('backbone.')}
    elif path.stem.startswith('cascade'):
        assert len(others) == 148
        assert others == cascade_head_keys()
    elif re.match('mask_rcnn_(local)?vim_', path.stem):
        like = full_model(ROOT / 'configs/cascade_vim_ti_coco.py').state_dict()
        single = {name.replace('bbox_head.0.', 'bbox_head.') for name in like if not re.match(
            r'backbone\.|roi_head\.bbox_head\.[12]\.', name)}
        assert others == single
    elif path.stem.startswith('mask_rcnn'):
        assert others == mask_rcnn_head_keys()
    else:
        neck = {name for name in others if name.startswith('neck.')}
        assert others - neck == upernet_head_keys()
        assert bool(neck) == ('deit' in path.stem)

    if RECIPES[path.stem]['keys'] is None:
        return
    official = official_keys(RECIPES[path.stem]['keys'])
    if any(name.startswith('decode_head.') for name in official):
        assert state == official
    elif any(name.startswith('roi_heads.') for name in official):
        assert {in_detectron2(name): shape for name, shape in state.items()} == official
    elif any(name.startswith('simfp_') for name in official):
        trunk = {in_detectron2(name).removeprefix('backbone.'): shape
                 for name, shape in state.items() if name.startswith(('backbone.', 'neck.'))}
        assert trunk == official
    else:
        assert backbone == official


@published_model
def test_parameter_count(path):
    count = sum(p.numel() for p in full_model(path).parameters())
    assert count == RECIPES[path.stem]['parameters']


def drop_path_rates(backbone):
    """Rates of all modules of that name, whoever wrote them."""
    return [getattr(module, 'rate', getattr(module, 'drop_prob', None))
            for module in backbone.modules() if type(module).__name__ == 'DropPath']


@every_model
def test_drop_path_really_is_what_the_published_models_used(path):
    cfg = load(path)
    rates = drop_path_rates(full_model(path).backbone)
    if path not in PUBLISHED:
        expected = cfg.model.backbone.get('drop_path_rate', 0.2)
    else:
        expected = RECIPES[path.stem]['drop_path']
    assert max(rates, default=0.0) == pytest.approx(expected, abs=1e-6)
    assert rates == sorted(rates)


def test_a_changed_setting_changes_the_module():
    cfg = load(ROOT / 'configs/cascade_mambavision_t_coco.py')
    cfg.model.backbone.drop_path_rate = 0.4
    assert max(drop_path_rates(build_on_meta(cfg).backbone)) == pytest.approx(0.4, abs=1e-6)


MINI_KEYS = {
    'MambaVision': ['mambavision/T'],
    'VMamba': ['vmamba/vmamba_tiny_s1l8_dense', 'vmamba/vmamba_v0_tiny_dense'],
    'LocalVMamba': ['localmamba/local_vssm_tiny_dense'],
    'LocalVim': ['localmamba/local_vim_tiny_dense_seg'],
    'Vim': ['vim/seg_vim_s_512_rope'],
}


@cache
def official_keys(listed):
    """Names and shapes of a published network, by family and name."""
    family, _, name = listed.partition('/')
    if family == 'mambavision':
        entries = json.loads((KEYS / family / f'keys/{name}.json').read_text())['dense']
        return {name: shape for name, shape, _ in entries}
    return json.loads((KEYS / family / 'keys.json').read_text())[name]['keys']


# What detectron2 calls the parts of an mmdet detector with a pyramid from one map.
DETECTRON2 = (
    (r'\Aneck\.', 'backbone.'),
    (r'\Abackbone\.(?!simfp_)', 'backbone.net.'),
    (r'\Arpn_head\.rpn_conv\.(\d)\.conv\.', r'proposal_generator.rpn_head.conv.conv\1.'),
    (r'\Arpn_head\.rpn_cls\.', 'proposal_generator.rpn_head.objectness_logits.'),
    (r'\Arpn_head\.rpn_reg\.', 'proposal_generator.rpn_head.anchor_deltas.'),
    (r'\Aroi_head\.bbox_head\.(\d)\.fc_cls\.', r'roi_heads.box_predictor.\1.cls_score.'),
    (r'\Aroi_head\.bbox_head\.(\d)\.fc_reg\.', r'roi_heads.box_predictor.\1.bbox_pred.'),
    (r'\Aroi_head\.bbox_head\.(\d)\.shared_fcs\.0\.', r'roi_heads.box_head.\1.fc1.'),
    (r'\Aroi_head\.bbox_head\.(\d)\.shared_convs\.', r'roi_heads.box_head.\1.conv'),
    (r'\Aroi_head\.mask_head\.convs\.', 'roi_heads.mask_head.mask_fcn'),
    (r'\Aroi_head\.mask_head\.upsample\.', 'roi_heads.mask_head.deconv.'),
    (r'\Aroi_head\.mask_head\.conv_logits\.', 'roi_heads.mask_head.predictor.'),
)


def in_detectron2(name):
    for pattern_, replacement in DETECTRON2:
        name = re.sub(pattern_, replacement, name)
    # Convolutions of the heads are counted from one there, and own their norms.
    name = re.sub(r'(head\.\d\.conv|mask_fcn)(\d)\.', lambda m: f'{m[1]}{int(m[2]) + 1}.', name)
    if name.startswith('roi_heads.'):
        name = name.replace('.conv.', '.').replace('.ln.', '.norm.')
    return name


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


@every_model
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
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None, f'{name} got no gradient'
        assert torch.isfinite(parameter.grad).all(), f'the gradient of {name} is not finite'
    # Parts that are there for their names' sake, and what the recipe freezes.
    assert len(trained) > len(dict(model.named_parameters())) * 0.8
    # The gradient arrives at the first convolution. In ResNet the recipe freezes the first ones and
    # residual branches begin with factors of zero, which leaves the shortcut of the first block.
    kernels = [name for name, p in model.backbone.named_parameters()
               if p.requires_grad and p.ndim == 4]
    stem = next(name for name in kernels if trained[f'backbone.{name}'].grad.abs().max() > 0)
    assert kernels.index(stem) == (3 if cfg.model.backbone.get('frozen_stages') == 1 else 0)

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


@published_model
def test_rates_and_decays_of_the_groups_are_the_published_rule(path):
    cfg, model, recipe = load(path), full_model(path), RECIPES[path.stem]
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    found = {id(p): (group['lr'], group['weight_decay'])
             for group in wrapper.optimizer.param_groups for p in group['params']}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)
    for name, parameter in trained.items():
        longest = max((key for key in recipe['custom'] if key in name), key=len, default=None)
        lr_mult, decay_mult = recipe['custom'].get(longest, [None, None])
        if recipe['layer_decay']:  # blocks count from the last one, the embedding follows them
            block = re.match(r'backbone\.(layers|net\.model\.blocks)\.(\d+)', name)
            blocks = 12 if 'deit' in path.stem else 24
            depth = blocks - int(block[2]) if block else (
                blocks + 1) * name.startswith('backbone.')
            lr_mult = recipe['layer_decay'] ** depth
        if decay_mult is None:
            decay_mult = {
                'published': 'norm' not in name,
                '1d': parameter.ndim > 1 and not name.endswith('.bias'),
                None: True,
            }[recipe['no_decay']]
        lr, decay = found[id(parameter)]
        assert lr == pytest.approx(recipe['lr'] * (1 if lr_mult is None else lr_mult)), name
        assert decay == pytest.approx(recipe['weight_decay'] * decay_mult), name
    if path.stem == 'cascade_mambavision_t_coco':
        free = [name for name, p in trained.items() if found[id(p)][1] == 0.0]
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


def distinct_pipelines():
    """One config for each set of pipelines."""
    first = {}
    for path in CONFIGS:
        cfg = load(path)
        key = repr([cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline,
                    cfg.test_dataloader.dataset.pipeline, cfg.tta_pipeline])
        first.setdefault(key, path)
    return by_name(first.values())


@pytest.mark.parametrize('path', distinct_pipelines())
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
    choices = [len(step) for step in cfg.tta_pipeline[-1].transforms]
    assert len(images['tta']['inputs']) == np.prod(choices)
    if path in PUBLISHED:
        assert np.prod(choices) == (2 if 'roi_head' in cfg.model else 6 * 2)
    assert {sample.flip for sample in images['tta']['data_samples']} == {False, True}
    if test_scale:
        short, long = sorted(images['test']['inputs'].shape[1:])
        assert short == min(test_scale[0]) or long == max(test_scale[0])
        assert max(images['train']['inputs'].shape[1:]) <= max(1333, *test_scale[0])


# --- model-index.yml -----------------------------------------------------------------------------


def metafile_models():
    from mmengine.fileio import load as load_file

    index = load_file(ROOT / 'model-index.yml')
    # test_classification_configs.py looks at the other one
    assert index['Import'] == ['configs/metafile.yml', 'configs/classification/metafile.yml']
    return load_file(ROOT / index['Import'][0])['Models']


def test_the_model_index_lists_every_published_config_once():
    listed = [model['Config'] for model in metafile_models()]
    assert sorted(listed) == [f'configs/{path.name}' for path in PUBLISHED]
    # mmengine looks a config up by what follows the first slash.
    assert [path.partition('/')[-1] for path in listed] == [Path(path).name for path in listed]


def test_the_model_index_claims_nothing_without_a_source():
    for model in metafile_models():
        assert model['Name'] == Path(model['Config']).stem
        expected = RECIPES[model['Name']]
        metadata = model['Metadata']
        assert metadata['Parameters'] == expected['parameters']
        length = 'epochs' if 'epochs' in expected else 'iterations'
        assert metadata[length.capitalize()] == expected[length]
        assert metadata['Batch Size'] == expected['images'][1]
        assert metadata['Training Data'] == (
            'ADE20K' if model['Name'].endswith('ade20k') else 'COCO 2017')
        published = {}
        for result in model['Results']:
            assert result['measured'] is False
            assert re.match('log|README|paper|figure|metafile', result['provenance'])
            published.update(result['Metrics'])
        assert published == expected['published']
        if expected['weights'] is None:
            assert 'Weights' not in model and 'Weights License' not in model
        elif expected['weights'] in RELEASED:
            row = RELEASED[expected['weights']]
            assert row.address
            assert (model['Weights'], model['Weights License']) == (row.address, row.license)


@pytest.mark.parametrize(('name', 'metric', 'value'), [
    ('upernet_vmamba_t_ade20k', 'mIoU (multi-scale)', 48.8),
    ('upernet_vmamba_s_ade20k', 'mIoU (multi-scale)', 51.2),
    ('upernet_vmamba_b_ade20k', 'mIoU (multi-scale)', 51.6),
    ('upernet_localvmamba_s_ade20k', 'mIoU (multi-scale)', 51.0),
    ('mask_rcnn_vmamba_b_coco', 'box AP (batch 8)', 49.2),
    ('mask_rcnn_vmamba_b_coco', 'mask AP (batch 8)', 43.9),
    ('upernet_mambavision_b_ade20k', 'mIoU (best iteration)', 49.23),
    ('upernet_mambavision_l3_ade20k', 'mIoU (best iteration)', 53.43),
])
def test_results_of_other_tests_and_trainings_stand_by_themselves(name, metric, value):
    model, = (model for model in metafile_models() if model['Name'] == name)
    found = [result for result in model['Results'] if metric in result['Metrics']]
    assert [result['Metrics'] for result in found] == [{metric: value}]
    plain, = (result for result in model['Results']
              if metric.partition(' (')[0] in result['Metrics'])
    assert plain['provenance'] != found[0]['provenance']


def listed_by(package):
    """Entries of the metafiles that an installed mm package brings along."""
    from importlib.util import find_spec

    from mmengine.fileio import load as load_file

    folder = Path(find_spec(package).origin).parent / '.mim/configs'
    found = {}
    for path in folder.glob('*/metafile.y*ml'):
        content = load_file(path)
        models = content if isinstance(content, list) else content.get('Models') or []
        found.update({model['Name']: model for model in models})
    return found


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_peers_have_the_results_and_weights_of_their_own_package(package):
    listed, checked = listed_by(package), []
    for model in metafile_models():
        recipe = RECIPES[model['Name']]
        theirs = (recipe.get('twin') or recipe['weights'] or '').partition('/')
        if theirs[0] != package:
            continue
        entry = listed[theirs[2]]
        results = entry['Results'] if isinstance(entry['Results'], list) else [entry['Results']]
        metrics = {name: value for result in results for name, value in result['Metrics'].items()}
        assert {name: metrics[name] for name in recipe['published']} == recipe['published']
        assert recipe['published'] and all(
            theirs[2] in result['provenance'] for result in model['Results'])
        if recipe['weights']:
            # Forks moved the files to another host.
            assert model['Weights'].rpartition('/')[2] == entry['Weights'].rpartition('/')[2]
            assert model['Weights License'] == 'not stated (Apache-2.0 repository)'
        checked.append(model['Name'])
    assert len(checked) == {'mmdet': 4, 'mmseg': 9}[package]


def test_mmengine_finds_a_config_and_its_weights_through_the_index(tmp_path):
    from mmengine.config.utils import _get_cfg_metainfo

    installed = tmp_path / '.mim'
    installed.mkdir()
    for name in ('configs', 'model-index.yml'):
        (installed / name).symlink_to(ROOT / name)
    for path in CONFIGS:
        if path in PUBLISHED:
            found = _get_cfg_metainfo(str(tmp_path), path.name)
            assert found['Name'] == path.stem
            assert (installed / found['Config']).samefile(path)
