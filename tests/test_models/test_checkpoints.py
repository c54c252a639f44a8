"""Weights go in completely and visibly, or not at all."""
import argparse
import logging
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from torch import nn

from mmhybrid.models import MambaVision, MambaVisionClassifier, MM_mamba_vision
from mmhybrid.models.backbones.mambavision import ARCHITECTURES
from mmhybrid.models.checkpoints import (
    Comparison,
    compare,
    load_backbone,
    read_checkpoint,
    strip_wrappers,
    unwrap_state_dict,
)

TOY = dict(dim=8, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4),
           window_size=(8, 8, 4, 3))


def pretrained(path, **more):
    return dict(type='Pretrained', checkpoint=str(path), **more)


def loaded(path, backbone=MambaVision, arch=TOY, **more):
    net = backbone(arch, init_cfg=pretrained(path, **more))
    net.init_weights()
    return net


def prefixed(prefix, state_dict):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


@pytest.fixture
def weights():
    torch.manual_seed(3)
    return MambaVisionClassifier(TOY, num_classes=7).state_dict()


@pytest.fixture
def log():
    logger = MMLogger.get_current_instance()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def assert_holds(net, weights):
    own = net.state_dict()
    shared = [name for name in weights if name in own]
    assert len(shared) > 90
    for name in shared:
        assert torch.equal(own[name], weights[name]), name


CONTAINERS = {
    'bare': lambda w: w,
    'state_dict': lambda w: dict(state_dict=w, epoch=3),
    'model': lambda w: dict(model=w),
    'timm': lambda w: dict(state_dict=w, state_dict_ema={n: t + 1 for n, t in w.items()},
                           args=argparse.Namespace(lr=0.1, opt=['lamb']), metric=np.float64(82.3),
                           optimizer=dict(step=np.int64(4))),
    'module.': lambda w: dict(state_dict=prefixed('module.', w)),
    'encoder.': lambda w: dict(state_dict={**prefixed('module.encoder.', w),
                                           'module.fc.weight': torch.zeros(2)}),
    'transformers': lambda w: prefixed('model.', w),
    'detector': lambda w: dict(
        state_dict={**prefixed('backbone.', w), 'neck.conv.weight': torch.zeros(2)},
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.5], [1])), runtime_info={}),
        meta=dict(seed=0)),
}


@pytest.mark.parametrize('container', CONTAINERS)
def test_containers(container, weights, tmp_path):
    torch.save(CONTAINERS[container](weights), tmp_path / 'w.pth.tar')
    assert_holds(loaded(tmp_path / 'w.pth.tar'), weights)


@pytest.mark.skipif(find_spec('safetensors') is None, reason='safetensors is not installed')
def test_safetensors(weights, tmp_path):
    from safetensors.torch import save_file
    save_file(prefixed('model.', weights), tmp_path / 'w.safetensors')
    assert_holds(loaded(tmp_path / 'w.safetensors'), weights)


def test_classification_file_in_dense_form(weights, tmp_path, log):
    torch.save(weights, tmp_path / 'cls.pth')
    dense = loaded(tmp_path / 'cls.pth')
    assert (dense.outnorm0.weight == 1).all()
    line, = [text for text in log if 'loaded from' in text]
    backbone = [n for n in weights if not n.startswith(('norm.', 'head.'))]
    assert line.endswith(f'cls.pth: {len(backbone)} tensors matched (100.0 %)')
    assert_holds(dense, weights)



def test_dense_file_in_classification_form_tells_what_lacks(tmp_path, log):
    arch = dict(ARCHITECTURES['tiny'], dim=8)
    dense = MambaVision(arch).state_dict()
    torch.save(dense, tmp_path / 'dense.pth')
    assert_holds(loaded(tmp_path / 'dense.pth', MambaVisionClassifier, arch), dense)
    line, = [text for text in log if 'loaded from' in text]
    assert 'missing: norm.weight (1)' in line and 'head.bias (1)' in line
    assert 'unexpected' not in line  # output norms have no place in this form


def test_prefix_chooses_a_part(weights, tmp_path):
    torch.save(dict(state_dict={**prefixed('teacher.', weights),
                                **prefixed('student.', {n: t + 1 for n, t in weights.items()})}),
               tmp_path / 'two.pth')
    assert_holds(loaded(tmp_path / 'two.pth', prefix='teacher.'), weights)
    assert_holds(loaded(tmp_path / 'two.pth', prefix='teacher'), weights)
    with pytest.raises(ValueError, match=r"begins with 'head\.'; names begin with teacher"):
        loaded(tmp_path / 'two.pth', prefix='head')


def test_parts_left_aside_are_counted(weights, tmp_path, log):
    torch.save(CONTAINERS['detector'](weights), tmp_path / 'det.pth')
    loaded(tmp_path / 'det.pth')
    assert any(text.endswith('1 of other parts left aside') for text in log)


def test_small_gaps_load_and_are_reported(weights, tmp_path, log):
    for name in [n for n in weights if n.endswith('num_batches_tracked')][:2]:
        del weights[name]
    weights['extra.weight'] = torch.zeros(1)
    torch.save(weights, tmp_path / 'w.pth')
    assert_holds(loaded(tmp_path / 'w.pth'), {k: v for k, v in weights.items() if 'extra' not in k})
    line, = [text for text in log if 'loaded from' in text]
    assert 'missing: patch_embed.conv_down.1.num_batches_tracked (1), ' in line
    assert 'unexpected: extra.weight (1)' in line


def test_too_little_is_refused_and_changes_nothing(weights, tmp_path):
    torch.save(dict(list(weights.items())[:-20]), tmp_path / 'part.pth')
    net = MambaVision(TOY, init_cfg=pretrained(tmp_path / 'part.pth'))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=r'part.pth does not fit MambaVision: \d+ tensors matched'):
        net.init_weights()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_fitting_variant_is_named(tmp_path):
    small = {n: t for n, t in MambaVision('small').state_dict().items()}
    torch.save(small, tmp_path / 'small.pth')
    with pytest.raises(ValueError, match="another shape .*The file has the shape of arch='small'"):
        loaded(tmp_path / 'small.pth', arch='tiny')


def test_depth_alone_is_noticed(tmp_path):
    torch.save(MambaVision(dict(ARCHITECTURES['tiny2'], dim=8)).state_dict(), tmp_path / 't2.pth')
    with pytest.raises(ValueError, match=r'dim=8 and depths=\(1, 3, 11, 4\), which is no'):
        loaded(tmp_path / 't2.pth', arch=dict(ARCHITECTURES['tiny'], dim=8))


def test_layer_scale_mismatch_is_refused(tmp_path):
    torch.save(MambaVision(TOY, layer_scale=1e-5).state_dict(), tmp_path / 'scaled.pth')
    with pytest.raises(ValueError, match='unexpected: levels.2.blocks.0'):
        loaded(tmp_path / 'scaled.pth')


def test_foreign_networks_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'linear.pth')
    with pytest.raises(ValueError, match='The file holds no MambaVision backbone'):
        loaded(tmp_path / 'linear.pth')


class Dangerous:
    def __reduce__(self):
        return os.system, ('echo this must not run',)


def test_code_in_a_file_does_not_run(weights, tmp_path, capfd):
    torch.save(dict(state_dict=weights, bad=Dangerous()), tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match=r'holds \w+\.system besides tensors.*keep only its wei'):
        loaded(tmp_path / 'bad.pth')
    assert 'must not run' not in capfd.readouterr().out


def test_allowed_names_are_inert_and_do_not_stay_allowed(tmp_path):
    args = argparse.Namespace(x=1)
    torch.save(dict(args=args, w=torch.ones(1)), tmp_path / 'a.pth')
    checkpoint = read_checkpoint(tmp_path / 'a.pth')
    assert not isinstance(checkpoint['args'], argparse.Namespace)
    with pytest.raises(Exception, match='argparse.Namespace'):
        torch.load(tmp_path / 'a.pth', weights_only=True)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no checkpoint file .*none.pth; check'):
        loaded(tmp_path / 'none.pth')
    (tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04 cut')
    with pytest.raises(ValueError, match='cut.pth'):
        loaded(tmp_path / 'cut.pth')
    with pytest.raises(ValueError, match='expected a local file; download it'):
        loaded('https://example.org/w.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds no tensors .*list'):
        loaded(tmp_path / 'list.pth')


def test_init_cfg_of_pretrained_is_strict(weights, tmp_path):
    torch.save(weights, tmp_path / 'w.pth')
    with pytest.raises(TypeError, match="'Pretrained': unknown key 'prefx'; did you mean 'prefix'"):
        loaded(tmp_path / 'w.pth', prefx='backbone.')


def test_pretrained_has_the_last_word(weights, tmp_path):
    torch.save(weights, tmp_path / 'w.pth')
    cfg = [pretrained(tmp_path / 'w.pth'), dict(type='Constant', layer='LayerNorm2d', val=2.)]
    net = MambaVision(TOY, init_cfg=cfg)
    net.init_weights()
    assert_holds(net, weights)
    assert (net.outnorm1.weight == 2).all() and net.init_cfg == cfg and net.is_init


def test_nothing_is_loaded_while_building_or_after_clearing(tmp_path):
    net = MambaVision(TOY, init_cfg=pretrained(tmp_path / 'missing.pth'))
    net.init_cfg = None
    net.init_weights()
    assert net.is_init


def test_inside_a_model(weights, tmp_path):
    from mmengine.model import BaseModule
    torch.save(weights, tmp_path / 'w.pth')

    class Detector(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = MambaVision(TOY, init_cfg=pretrained(tmp_path / 'w.pth'))

    model = Detector()
    model.init_weights()
    assert_holds(model.backbone, weights)


def test_dropin_loads_its_pretrained(weights, tmp_path):
    torch.save(dict(state_dict=weights), tmp_path / 'w.pth')
    net = MM_mamba_vision(dim=8, in_dim=4, depths=TOY['depths'], num_heads=TOY['num_heads'],
                          window_size=TOY['window_size'], pretrained=str(tmp_path / 'w.pth'))
    assert not torch.equal(net.state_dict()['levels.0.blocks.0.conv1.weight'],
                           weights['levels.0.blocks.0.conv1.weight'])
    net.init_weights()
    assert_holds(net, weights)


def test_pure_functions():
    module = nn.Linear(2, 3)
    state = dict(weight=torch.zeros(3, 2), bias=torch.zeros(2), head=torch.zeros(1))
    assert compare(module, state, may_differ='head') == Comparison(
        matched=['weight'], disagreeing=dict(bias=((2,), (3,))))
    assert compare(module, {}).missing == ['weight', 'bias'] and compare(module, {}).share == 0
    assert strip_wrappers({'module.backbone.a': 1, 'module.neck.b': 2}) == {'a': 1}
    assert unwrap_state_dict(dict(model=dict(a=torch.ones(1), n=3))).keys() == {'a'}


def test_load_backbone_returns_what_it_did(tmp_path):
    torch.save(dict(weight=torch.ones(3, 2), bias=torch.ones(3)), tmp_path / 'w.pth')
    module = nn.Linear(2, 3)
    result = load_backbone(module, tmp_path / 'w.pth')
    assert result.share == 1 and str(result) == '2 tensors matched (100.0 %)'
    assert (module.weight == 1).all()
