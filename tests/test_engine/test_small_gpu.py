"""--lora and --optimizer-8bit: what they make of a config, and what they refuse."""
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from mmhybrid import models
from mmhybrid.engine.small_gpu import (
    apply_eight_bit,
    apply_lora,
    check_adapters,
    check_lora_start,
    describe_lora,
)
from mmhybrid.errors import UserError

VIM = dict(type='mmhybrid.Vim', init_cfg=dict(type='Pretrained', checkpoint='w.pth'))


def config(backbone=VIM, **more):
    return Config(dict(model=dict(type='X', backbone=backbone), **more))


def test_rank_from_the_command_line_and_the_rest_from_the_config():
    cfg = config(dict(VIM, lora=dict(rank=2, norms=False)))
    apply_lora(cfg, None)
    assert cfg.model.backbone.lora == dict(rank=2, norms=False)
    apply_lora(cfg, 8)
    assert cfg.model.backbone.lora == dict(rank=8, norms=False)
    cfg = config()
    apply_lora(cfg, None)
    assert 'lora' not in cfg.model.backbone
    apply_lora(cfg, 8)
    assert cfg.model.backbone.lora == dict(rank=8)


def test_models_without_a_backbone_are_left_alone():
    cfg = Config(dict(model=dict(type='X')))
    apply_lora(cfg, None)
    with pytest.raises(UserError, match='--lora is for model.backbone, and this model has none'):
        apply_lora(cfg, 8)


@pytest.mark.parametrize('start', [
    dict(load_from='x.pth'), dict(resume=True),
    dict(backbone=dict(VIM, init_cfg=None, pretrained='x'))], ids=str)
def test_starts_that_have_weights(start):
    cfg = config(**dict(backbone=dict(type='mmhybrid.Vim')) | start)
    apply_lora(cfg, 8)
    check_lora_start(cfg)


@pytest.mark.parametrize(('backbone', 'words'), [
    (dict(type='mmhybrid.Vim'), 'from random ones, from which no detector learns. Add --pret'),
    (dict(VIM, lora=3), r'model.backbone.lora: got lora=3, expected a dictionary'),
    (dict(VIM, lora=dict(rnak=3)), "unknown key 'rnak'; did you mean 'rank'"),
])
def test_configs_that_cannot_be(backbone, words):
    with pytest.raises(UserError, match=words):
        cfg = config(backbone)
        if 'lora' not in backbone:
            cfg.model.backbone.lora = dict(rank=2)
        apply_lora(cfg, None)
        check_lora_start(cfg)


@pytest.mark.parametrize('kind', ['mmhybrid.MM_VSSM', 'mmhybrid.TimmFeatures', 'NoSuchBackbone'])
def test_backbones_that_have_no_adapters(kind):
    with pytest.raises(UserError, match=f"{kind}', which has no setting lora. These have"):
        apply_lora(config(dict(type=kind, init_cfg=VIM['init_cfg'])), 8)


def test_what_is_said_and_what_may_go_on():
    arch = dict(dim=16, depth=2)
    plain, model = (torch.nn.Module() for _ in range(2))
    for each, lora in ((plain, None), (model, dict(rank=2))):
        each.backbone = models.Vim(arch, out_indices=(0, 1), pyramid=False, img_size=32, lora=lora)
        each.head = torch.nn.Linear(1000, 10)
    assert describe_lora(plain) is None
    text = describe_lora(model)
    assert '(rank=2): 12 weights of the backbone' in text and 'heads) 0.01 M' in text
    check_adapters(plain, plain.state_dict(), 'a.pth')
    check_adapters(model, {f'module.{k}': v for k, v in model.state_dict().items()}, 'a.pth')
    with pytest.raises(UserError, match=r'a.pth was trained with adapters of 12 .*has no adapters'):
        check_adapters(plain, model.state_dict(), 'a.pth')
    with pytest.raises(UserError, match=r'with no adapters, and this run has adapters of 12'):
        check_adapters(model, plain.state_dict(), 'a.pth')


@pytest.fixture
def installed(monkeypatch):
    for name in ('AdamW8bit', 'PagedAdamW8bit', 'SGD8bit'):
        monkeypatch.setitem(OPTIMIZERS.module_dict, name, torch.optim.AdamW)


def wrapper(**optimizer):
    return config(optim_wrapper=dict(optimizer=dict(dict(type='AdamW', lr=1e-3), **optimizer)))


def test_eight_bits(installed, monkeypatch):
    cfg = wrapper(fused=True)
    assert apply_eight_bit(cfg, None) == [] and cfg.optim_wrapper.optimizer.fused
    assert apply_eight_bit(cfg, 'resident') == [
        'The optimizer is AdamW8bit of bitsandbytes, without fused.']
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW8bit', lr=1e-3)
    cfg = wrapper()
    with pytest.raises(UserError, match='and there is no GPU. Leave "paged" out'):
        apply_eight_bit(cfg, 'paged')
    monkeypatch.setattr('mmhybrid.engine.small_gpu.has_accelerator', lambda: True)
    assert apply_eight_bit(cfg, 'paged') == ['The optimizer is PagedAdamW8bit of bitsandbytes.']


@pytest.mark.parametrize(('kind', 'wanted', 'words'), [
    ('Adamax', 'resident', 'AdamW, Adam, Lion, SGD, RMSprop, Adagrad, and .* is .Adamax'),
    ('SGD', 'paged', '--optimizer-8bit paged is for AdamW, Adam, Lion, and .* is .SGD'),
    (None, 'resident', 'optim_wrapper.optimizer.type is None'),
])
def test_optimizers_without_such_states(installed, kind, wanted, words):
    with pytest.raises(UserError, match=words):
        apply_eight_bit(wrapper(type=kind), wanted)


def test_without_the_package(monkeypatch):
    for name in [name for name in OPTIMIZERS.module_dict if '8bit' in name]:
        monkeypatch.delitem(OPTIMIZERS.module_dict, name)
    cfg = wrapper()
    with pytest.raises(UserError, match='not installed .or does not import.: pip install bitsandb'):
        apply_eight_bit(cfg, 'resident')
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
