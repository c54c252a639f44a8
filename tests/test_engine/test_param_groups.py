"""Every trainable tensor is in exactly one group, with the decay its kind asks for."""
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
    (dict(no_decay='all'), ValueError, "'published', 'ssm' or None"),
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
