"""A new training starts from a checkpoint that fits, or not at all."""
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from mmengine.runner import BaseLoop, Runner
from released_files import FAMILIES, NESTINGS, dense, prefixed, weights
from torch import nn

from mmhybrid.engine import CheckpointCheckHook
from mmhybrid.engine.checkpoint_check import check_checkpoint_file
from mmhybrid.errors import UserError
from mmhybrid.weights import WeightsError


class Whole(nn.Module):
    def __init__(self, family, classes=2):
        super().__init__()
        self.backbone = dense(family)
        self.decode_head = nn.Conv2d(8, classes, 1)


def start(model, path, strict=True):
    """What Runner does with load_from."""
    runner = SimpleNamespace(model=model, _train_loop=Mock(spec=BaseLoop), _resume=False,
                             _load_from=str(path), logger=logging.getLogger('test'))
    hook = CheckpointCheckHook(strict=strict)
    runner.call_hook = lambda name, **given: getattr(hook, name)(runner, **given)
    Runner.load_checkpoint(runner, str(path))


def resume(model, path):
    """What Runner does with a checkpoint that must fit."""
    runner = SimpleNamespace(model=model, _train_loop=Mock(spec=BaseLoop), _resume=True,
                             _load_from=str(path), logger=logging.getLogger('test'))
    hook = CheckpointCheckHook()
    runner.call_hook = lambda name, **given: getattr(hook, name)(runner, **given)
    Runner.load_checkpoint(runner, str(path))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('nesting', ['timm', 'module', 'bare'])
def test_classification_files_go_into_the_backbone(nesting, family, tmp_path, caplog):
    model, right = Whole(family), weights(family)
    torch.save(NESTINGS[nesting](right), tmp_path / 'w.pth')
    with caplog.at_level(logging.INFO, 'test'):
        start(model, tmp_path / 'w.pth')
    state = model.backbone.state_dict()
    shared = [name for name in right if name in state and name != 'pos_embed']
    assert len(shared) > 20
    assert all(torch.equal(state[name], right[name]) for name in shared)
    assert f'{family} loaded from {tmp_path}/w.pth' in caplog.text


def test_whole_models_may_have_other_heads(tmp_path):
    source, model = Whole('VMamba', classes=5), Whole('VMamba')
    before = model.decode_head.weight.clone()
    torch.save(dict(state_dict=source.state_dict(), meta={}), tmp_path / 'seg.pth')
    start(model, tmp_path / 'seg.pth')
    name = 'layers.1.blocks.0.op.Ds'
    assert torch.equal(model.backbone.state_dict()[name], source.backbone.state_dict()[name])
    assert torch.equal(model.decode_head.weight, before)


def test_other_networks_are_refused(tmp_path):
    torch.save(NESTINGS['deit'](weights('Vim')), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='another family, Vim .*expected VMamba'):
        start(Whole('VMamba'), tmp_path / 'w.pth')
    torch.save(dict(state_dict=Whole('VMamba').state_dict()), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='another family, VMamba .*expected LocalVMamba'):
        start(Whole('LocalVMamba'), tmp_path / 'w.pth')
    part = dict(list(prefixed('backbone.', weights('VMamba')).items())[::3])
    torch.save(dict(state_dict=part), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='strict=False'):
        start(Whole('VMamba'), tmp_path / 'w.pth')
    start(Whole('VMamba'), tmp_path / 'w.pth', strict=False)


def test_files_are_looked_at_before_the_run(tmp_path, monkeypatch):
    torch.save(weights('VMamba'), tmp_path / 'w.pth')
    check_checkpoint_file(str(tmp_path / 'w.pth'))
    (tmp_path / 'page.pth').write_text('<html>')
    with pytest.raises(UserError, match='The checkpoint .*page.pth is a web page'):
        check_checkpoint_file(str(tmp_path / 'page.pth'))
    with pytest.raises(UserError, match='The checkpoint localvim-s has no address'):
        check_checkpoint_file('localvim-s')
    asked = []
    monkeypatch.setattr('mmhybrid.engine.checkpoint_check.fetch', asked.append)
    check_checkpoint_file('mambavision-t-1k')
    check_checkpoint_file('https://example.org/w.pth')
    check_checkpoint_file('s3://bucket/w.pth')  # mmengine's own affair
    assert asked == ['mambavision-t-1k', 'https://example.org/w.pth']


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.',
                                    '_orig_mod.module.', 'module.module.'])
def test_wrapped_whole_models_are_loaded(prefix, tmp_path):
    """mmengine alone takes 'module.' away, once; the rest would stay random without a word."""
    from mmhybrid.engine.checkpoint_check import check_whole
    from mmhybrid.models import load_weights
    from mmhybrid.weights import strip_parallel
    from mmhybrid.weights.conversion import convert, restore
    source, name = Whole('VMamba'), 'layers.1.blocks.0.op.Ds'
    torch.nn.init.normal_(source.backbone.get_parameter(name))
    wrapped = prefixed(prefix, source.state_dict())
    bare, removed = strip_parallel(wrapped)
    assert removed == prefix and list(bare) == list(source.state_dict())
    torch.save(dict(state_dict=wrapped), tmp_path / 'w.pth')
    assert check_whole(Whole('VMamba'), dict(state_dict=wrapped)) == []
    convert(tmp_path / 'w.pth', tmp_path / 'clean.pth')
    restore(tmp_path / 'clean.pth', tmp_path / 'again.pth')
    assert list(torch.load(tmp_path / 'again.pth')['state_dict']) == list(wrapped)
    for load in (start, load_weights, resume):
        for file in ('w.pth', 'clean.pth'):
            model = Whole('VMamba')
            load(model, tmp_path / file)
            for key, value in model.state_dict().items():
                assert torch.equal(value, source.state_dict()[key]), (load, key)


def test_nothing_is_stripped_that_not_all_have():
    from mmhybrid.weights import strip_parallel
    for names in ([], ['module.a', 'b'], ['modules.a'], ['module', 'module.a'], ['a.module.b']):
        assert strip_parallel(dict.fromkeys(names)) == (dict.fromkeys(names), '')


@pytest.mark.parametrize(('name', 'told'), [
    ('mambavision_L3_21k_740m_512.pth', 1), ('epoch_10.pth', 0)])
def test_the_windows_of_a_published_classifier_are_compared_when_testing(
        name, told, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('mmhybrid.models.checkpoints.print_log',
                        lambda text, **_: lines.append(text))
    _, build, settings, _ = FAMILIES['MambaVision']
    model = nn.Module()
    model.backbone = build(**settings)
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / name)
    resume(model, tmp_path / name)
    assert len(lines) == told
    assert all('needs window_size=(8, 8, 32, 16), but the model has (8, 8, 4, 3)' in line
               for line in lines)
