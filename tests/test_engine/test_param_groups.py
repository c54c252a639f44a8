"""Every trainable tensor is in exactly one group, with the decay its kind asks for."""
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmhybrid.engine  # noqa: F401

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
BASE = dict(type='OptimWrapper', constructor='mmhybrid.HybridOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_down = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.norm1 = nn.LayerNorm(4)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.ones(4))
        self.gamma_1 = nn.Parameter(torch.ones(4))
        self.proj = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.zeros(5, 4))


def decays(model, **paramwise):
    """Weight decay and learning rate of each parameter by name; fails if one is in two groups."""
    wrapper = build_optim_wrapper(model, dict(BASE, paramwise_cfg=paramwise))
    found = {}
    for group in wrapper.optimizer.param_groups:
        for param in group['params']:
            assert id(param) not in found
            found[id(param)] = group['weight_decay'], group['lr']
    named = {name: found.pop(id(param)) for name, param in model.named_parameters()
             if param.requires_grad}
    assert not found
    return named


def free(named):
    return {name for name, (decay, _) in named.items() if decay == 0}


def test_published():
    assert free(decays(Small(), no_decay='published')) == {'norm1.weight', 'norm1.bias'}


def test_ssm():
    named = decays(Small(), no_decay='ssm')
    assert set(named) - free(named) == {'conv_down.0.weight', 'proj.weight', 'table'}


def test_one_dimensional():
    named = decays(Small(), no_decay='1d')
    assert set(named) - free(named) == {'conv_down.0.weight', 'A_log', 'proj.weight', 'table'}


def test_state_space_names_of_every_direction():
    model = nn.ParameterDict({name: torch.zeros(4, 2) for name in (
        'A_log_0', 'D_3', 'A_b_log', 'D_b', 'A_logs', 'conv', 'AD_0')})
    named = decays(model, no_decay='ssm')
    assert set(named) - free(named) == {'conv', 'AD_0'}


def test_none():
    assert not free(decays(Small(), no_decay=None, print_groups=True))


def test_no_decay_mark_is_read():
    model = Small()
    model.table._no_weight_decay = True
    assert 'table' in free(decays(model, no_decay='ssm'))
    assert 'table' not in free(decays(model, no_decay='published'))


def test_frozen_parameters_stay_out():
    model = Small()
    model.proj.requires_grad_(False)
    assert not any(name.startswith('proj') for name in decays(model, no_decay='ssm'))


def test_longest_custom_key_wins():
    named = decays(Small(), no_decay='ssm', custom_keys={
        'conv': dict(lr_mult=0.1), 'conv_down.0': dict(lr_mult=0.5, decay_mult=2.0)})
    assert named['conv_down.0.weight'] == pytest.approx((0.1, 5e-4))
    assert named['conv_down.0.bias'] == pytest.approx((0.1, 5e-4))
    # An entry that only sets the learning rate leaves the norm without decay.
    assert named['conv_down.1.weight'] == pytest.approx((0.0, 1e-4))
    assert named['proj.weight'] == pytest.approx((0.05, 1e-3))


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.again.weight = other.proj.weight


def test_shared_tensor():
    model = Small()
    tied = nn.ModuleDict(dict(a=model, b=Tied(model)))
    with pytest.raises(ValueError, match='b.again.weight and a.proj.weight are the same tensor'):
        decays(tied, no_decay='ssm')
    named = decays(tied, no_decay='ssm', bypass_duplicate=True)
    assert 'a.proj.weight' in named and 'b.again.weight' not in named


@pytest.mark.parametrize('paramwise, error, text', [
    (dict(no_decy='ssm'), TypeError, "Did you mean 'no_decay'"),
    (dict(no_decay='all'), ValueError, "'published', 'ssm', '1d' or None"),
    (dict(layer_decay=0), ValueError, 'above 0 and at most 1'),
    (dict(layer_decay=True), ValueError, 'above 0 and at most 1'),
    (dict(layer_decay=0.7), ValueError, 'Small does not. Leave layer_decay out'),
    (dict(custom_keys=dict(conv=dict(lr_mul=1))), TypeError, "Did you mean 'lr_mult'"),
    (dict(custom_keys=['conv']), TypeError, 'must be a dict'),
])
def test_mistakes(paramwise, error, text):
    with pytest.raises(error, match=text):
        build_optim_wrapper(Small(), dict(BASE, paramwise_cfg=paramwise))


def test_decay_rule_without_decay():
    cfg = dict(BASE, optimizer=dict(type='SGD', lr=0.1), paramwise_cfg=dict(no_decay='ssm'))
    with pytest.raises(ValueError, match='weight_decay is not given'):
        build_optim_wrapper(Small(), cfg)


# Small networks with every kind of part that the family has.
STAGED = dict(dim=16, depths=(1, 2, 3, 1))
PLAIN = dict(dim=16, depth=5, state_dim=4)
FAMILIES = {
    'MambaVision': dict(arch=dict(STAGED, stem_width=8, num_heads=(1, 1, 2, 2),
                                  window_size=(8, 8, 4, 4), layer_scale=1e-5)),
    'VMamba': dict(arch=STAGED),
    'LocalVMamba': dict(arch=STAGED, directions='unsearched'),
    'Vim': dict(arch=PLAIN, out_indices=(1, 2, 3, 4)),
    'LocalVim': dict(arch=PLAIN, directions='unsearched', out_indices=(1, 4)),
}
BLOCK = re.compile(r'backbone\.(?:levels|layers)\.(\d+)(?:\.blocks\.(\d+))?\.(\w+)')


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('family', FAMILIES)
def test_layer_decay_follows_the_declared_depth(family, scope):
    init_default_scope(scope)
    backbone = MODELS.build(dict(type=f'mmhybrid.{family}', **FAMILIES[family]))
    model = nn.ModuleDict(dict(
        backbone=backbone, neck=nn.Conv2d(16, 8, 1), decode_head=nn.Linear(8, 2)))
    rates = {name: lr / 1e-3 for name, (_, lr) in decays(model, layer_decay=0.5).items()}
    blocks = 5 if family in ('Vim', 'LocalVim') else 7

    by_block, seen = {}, set()
    for name, rate in rates.items():
        block = BLOCK.match(name)
        if not name.startswith('backbone.') or re.match(r'backbone\.(outnorm|fpn|norm_f)', name):
            assert rate == 1, name  # whatever follows the last block
        elif block is None:
            assert re.match(r'backbone\.(patch_embed\.|pos_embed)', name), name
            assert rate == 0.5 ** (blocks + 1), name
            seen.add('embedding')
        elif block[3] == 'downsample':  # goes with the last block of its stage
            assert rate == max(by_block[key] for key in by_block if key[0] == int(block[1])), name
            seen.add('downsample')
        else:
            key = int(block[1]), int(block[2] or 0)
            assert by_block.setdefault(key, rate) == rate, name
    # One step per block from the first to the last, which is one step below the heads.
    ordered = [by_block[key] for key in sorted(by_block)]
    assert ordered == [0.5 ** (blocks - i) for i in range(blocks)]
    assert seen == {'embedding'} | ({'downsample'} if blocks == 7 else set())


def test_layer_decay_multiplies_and_keeps_the_decay_rule():
    backbone = MODELS.build(dict(type='mmhybrid.VMamba', arch=STAGED))
    named = decays(nn.ModuleDict(dict(backbone=backbone)), no_decay='ssm', layer_decay=0.5,
                   custom_keys={'layers.3.blocks': dict(lr_mult=0.1)})
    assert named['backbone.layers.3.blocks.0.op.in_proj.weight'] == pytest.approx((0.05, 5e-5))
    assert named['backbone.layers.3.blocks.0.norm.weight'] == pytest.approx((0, 5e-5))
    assert named['backbone.layers.2.blocks.2.norm.bias'] == pytest.approx((0, 2.5e-4))


def test_layer_decay_of_a_backbone_by_itself():
    backbone = MODELS.build(dict(type='mmhybrid.VMamba', arch=STAGED))
    named = decays(backbone, layer_decay=0.5)
    assert named['patch_embed.0.weight'] == pytest.approx((0.05, 1e-3 / 256))
    assert named['outnorm3.weight'] == pytest.approx((0.05, 1e-3))


def test_layer_decay_is_reported(monkeypatch):
    printed = []
    monkeypatch.setattr('mmhybrid.engine.param_groups.print_log',
                        lambda text, **kwargs: printed.append(text))
    decays(MODELS.build(dict(type='mmhybrid.VMamba', arch=STAGED)), layer_decay=0.5)
    title, *rows = printed[-1].splitlines()
    assert 'layer_decay=0.5' in title
    assert [row.split()[1] for row in rows] == [
        f'{1e-3 * 0.5 ** (8 - depth):g},' for depth in range(9)]


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmengine'])
@pytest.mark.parametrize('kind', ['OptimWrapper', 'mmhybrid.AmpOptimWrapper'])
def test_scopes_and_wrappers(scope, kind):
    init_default_scope(scope)
    wrapper = build_optim_wrapper(Small(), dict(BASE, type=kind,
                                                paramwise_cfg=dict(no_decay='ssm')))
    assert type(wrapper).__name__ == kind.rpartition('.')[2]
    assert len(wrapper.optimizer.param_groups) == 2


@pytest.fixture(scope='module')
def detector():
    cfg = Config.fromfile(CONFIGS / 'cascade_mambavision_t_coco.py')
    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def test_released_detector(detector):
    """72 of 335 tensors are free of decay in the released recipe (measured from it)."""
    named = decays(detector, no_decay='published')
    assert len(named) == 335
    exempt = free(named)
    assert len(exempt) == 72
    assert all('.norm' in name or 'outnorm' in name for name in exempt)
    kept = set(named) - exempt
    for part in ('A_log', '.D', 'dt_proj.bias', 'conv_down.1.weight', 'conv_down.4.weight'):
        assert any(name.endswith(part) for name in kept), part


def test_ssm_policy_on_the_detector(detector):
    named = decays(detector, no_decay='ssm')
    shapes = {name: param.ndim for name, param in detector.named_parameters()}
    kept = set(named) - free(named)
    assert all(shapes[name] >= 2 and not name.endswith('A_log') for name in kept)
    assert all(name.endswith('A_log') for name in free(named) if shapes[name] >= 2)
    assert sum(name.endswith('A_log') for name in free(named)) == 6


def test_table(monkeypatch):
    printed = []
    monkeypatch.setattr('mmhybrid.engine.param_groups.print_log',
                        lambda text, **kwargs: printed.append(text))
    decays(Small(), no_decay='ssm', print_groups=True)
    lines = [line.split() for line in printed[-1].splitlines()[1:]]
    assert sorted(line[3] for line in lines) == sorted(
        name for name, _ in Small().named_parameters())
    norm = next(line for line in lines if line[3] == 'norm1.weight')
    assert norm[1:3] == ['0.001', '0']
