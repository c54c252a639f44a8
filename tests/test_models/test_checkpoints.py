"""Weights go in completely and visibly, or not at all."""
import argparse
import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from released_files import Hostile
from torch import nn

from mmhybrid.models import MambaVision, MambaVisionClassifier, MM_mamba_vision
from mmhybrid.models.backbones.mambavision import ARCHITECTURES
from mmhybrid.models.checkpoints import (
    Comparison,
    check_windows,
    compare,
    load_backbone,
    load_weights,
)
from mmhybrid.weights import RELEASED, WeightsError, unwrap

TOY = dict(dim=8, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4),
           window_size=(8, 8, 4, 3))


def pretrained(path, **more):
    return dict(type='Pretrained', checkpoint=str(path), **more)


def loaded(path, backbone=MambaVision, arch=TOY, in_channels=3, **more):
    net = backbone(arch, in_channels=in_channels, init_cfg=pretrained(path, **more))
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
    # Weights of convolutions lie with channels last, which this format does not know.
    plain = {name: w.contiguous() for name, w in prefixed('model.', weights).items()}
    save_file(plain, tmp_path / 'w.safetensors')
    assert_holds(loaded(tmp_path / 'w.safetensors'), weights)


def test_classification_file_in_dense_form(weights, tmp_path, log):
    torch.save(weights, tmp_path / 'cls.pth')
    dense = loaded(tmp_path / 'cls.pth')
    assert (dense.outnorm0.weight == 1).all()
    report, = [text for text in log if 'loaded from' in text]
    count = sum(not name.startswith(('norm.', 'head.')) for name in weights)
    assert f'{count} of {count} tensors, 100.0 % of' in report
    assert 'starts fresh  outnorm0 (2), outnorm1 (2), outnorm2 (2), outnorm3 (2)' in report
    assert 'not needed    norm (5), head (2)' in report
    assert 'missing' not in report and 'unexpected' not in report
    assert_holds(dense, weights)



def test_dense_file_in_classification_form_tells_what_lacks(tmp_path, log):
    arch = dict(ARCHITECTURES['tiny'], dim=8)
    dense = MambaVision(arch).state_dict()
    torch.save(dense, tmp_path / 'dense.pth')
    assert_holds(loaded(tmp_path / 'dense.pth', MambaVisionClassifier, arch), dense)
    report, = [text for text in log if 'loaded from' in text]
    assert 'missing       norm.weight (1)' in report and 'head.bias (1)' in report
    assert 'unexpected' not in report  # output norms have no place in this form


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
    report, = [text for text in log if 'loaded from' in text]
    assert "(in 'state_dict', without 'backbone.')" in report
    assert report.endswith('left aside    neck (1)')


def test_small_gaps_load_and_are_reported(weights, tmp_path, log):
    for name in [n for n in weights if n.endswith('num_batches_tracked')][:2]:
        del weights[name]
    weights['extra.weight'] = torch.zeros(1)
    torch.save(weights, tmp_path / 'w.pth')
    assert_holds(loaded(tmp_path / 'w.pth'), {k: v for k, v in weights.items() if 'extra' not in k})
    report, = [text for text in log if 'loaded from' in text]
    assert 'missing       patch_embed.conv_down.1.num_batches_tracked (1), ' in report
    assert 'unexpected    extra.weight (1)' in report


def test_too_little_is_refused_and_changes_nothing(weights, tmp_path):
    part = {name: tensor for i, (name, tensor) in enumerate(weights.items()) if i % 9}
    torch.save(part, tmp_path / 'part.pth')
    net = MambaVision(TOY, init_cfg=pretrained(tmp_path / 'part.pth'))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=r'part.pth does not fit MambaVision: \d+ tensors match '):
        net.init_weights()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_fitting_variant_is_named(tmp_path):
    torch.save(MambaVision('small').state_dict(), tmp_path / 'small.pth')
    with pytest.raises(WeightsError, match=r"another variant, MambaVision arch='small' \(dim=96.*"
                       r"expected MambaVision arch='tiny'.*set arch='small', or give a file of "
                       'this variant, e.g. mambavision-t-1k'):
        loaded(tmp_path / 'small.pth', arch='tiny')


def test_depth_alone_is_noticed(tmp_path):
    torch.save(MambaVision(dict(ARCHITECTURES['tiny2'], dim=8)).state_dict(), tmp_path / 't2.pth')
    with pytest.raises(WeightsError, match=r'another variant, .*depths=\(1, 3, 11, 4\)'):
        loaded(tmp_path / 't2.pth', arch=dict(ARCHITECTURES['tiny'], dim=8))


def test_layer_scale_mismatch_is_refused(tmp_path):
    torch.save(MambaVision(TOY, layer_scale=1e-5).state_dict(), tmp_path / 'scaled.pth')
    with pytest.raises(WeightsError, match='unexpected: levels.2.blocks.0.*strict=False'):
        loaded(tmp_path / 'scaled.pth')
    net = loaded(tmp_path / 'scaled.pth', strict=False)
    assert_holds(net, torch.load(tmp_path / 'scaled.pth', weights_only=True))


def test_foreign_networks_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'linear.pth')
    for strict in (True, False):  # nothing at all is never enough
        with pytest.raises(WeightsError, match=r'no network that is known here \(.*weight \(1\)'):
            loaded(tmp_path / 'linear.pth', strict=strict)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no checkpoint file .*none.pth; check'):
        loaded(tmp_path / 'none.pth')
    (tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04 cut')
    with pytest.raises(ValueError, match='cut.pth'):
        loaded(tmp_path / 'cut.pth')
    with pytest.raises(ValueError, match='expected a path, http.*download it'):
        loaded('s3://bucket/w.pth')
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


def test_other_numbers_of_channels(weights, tmp_path, log):
    torch.save(weights, tmp_path / 'w.pth')
    name = 'patch_embed.conv_down.0.weight'
    grey, four = (loaded(tmp_path / 'w.pth', in_channels=n).state_dict()[name] for n in (1, 4))
    assert torch.equal(grey[:, 0], weights[name].sum(1))
    torch.testing.assert_close(four[:, 3], four[:, 0])
    torch.testing.assert_close(four[:, :3], weights[name] * 0.75)
    report, _ = [text for text in log if 'loaded from' in text]
    assert 'resized       patch_embed.conv_down.0.weight 4x3x3x3 -> 4x1x3x3' in report


def test_averaged_weights_on_request(weights, tmp_path):
    torch.save(CONTAINERS['timm'](weights), tmp_path / 'w.pth')
    assert_holds(loaded(tmp_path / 'w.pth', key='state_dict_ema'),
                 {n: t + 1 for n, t in weights.items()})
    with pytest.raises(WeightsError, match=r"key='model_ema'.*has the keys \['state_dict', 'state"):
        loaded(tmp_path / 'w.pth', key='model_ema')
    torch.save(dict(model_ema=weights), tmp_path / 'ema.pth')
    with pytest.raises(WeightsError, match="on request: key='model_ema'"):
        loaded(tmp_path / 'ema.pth')


def test_whole_models(weights, tmp_path):
    def whole(fill):
        model = nn.Module()
        model.backbone = MambaVision(TOY)
        model.decode_head = nn.Conv2d(8, 2, 1)
        nn.init.constant_(model.decode_head.weight, fill)
        return model

    torch.save(dict(state_dict=prefixed('module.', whole(5).state_dict())), tmp_path / 'seg.pth')
    torch.save(weights, tmp_path / 'cls.pth')
    model = whole(1)
    report = load_weights(model, tmp_path / 'cls.pth')
    assert_holds(model.backbone, weights) and report.module == 'MambaVision'
    assert (model.decode_head.weight == 1).all()
    report = load_weights(model, tmp_path / 'seg.pth')
    assert (model.decode_head.weight == 5).all() and report.comparison.share == 1
    assert 'segmentor' in str(report) and report.comparison.missing == []


def test_trust_reaches_whole_models(weights, tmp_path):
    model = nn.Module()
    model.backbone = MambaVision(TOY)
    torch.save(dict(state_dict=weights, more=Hostile(tmp_path / 'ran')), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match='was not loaded: it contains'):
        load_weights(model, tmp_path / 'w.pth')
    assert load_weights(model, tmp_path / 'w.pth', trust=True).fits
    assert_holds(model.backbone, weights)


WARNING = ('is the classifier mambavision-l3-512-21k, which needs window_size=(8, 8, 32, 16), but '
           'the model has (8, 8, 4, 3), so that it gives other results; set window_size if you did '
           'not mean to change it.')
NAMED = 'mambavision_L3_21k_740m_512.pth.tar'


def told_of_windows(log):
    return [line for line in log if 'window_size' in line]


@pytest.mark.parametrize('way', ['init_cfg', 'load_backbone', 'load_weights', 'inside'])
def test_a_classifier_with_other_windows_than_the_file_says_so(way, weights, tmp_path, log):
    path = tmp_path / NAMED
    torch.save(dict(state_dict=weights), path)
    net = MambaVisionClassifier(TOY, num_classes=7, init_cfg=pretrained(path))
    if way == 'init_cfg':
        net.init_weights()
    elif way == 'load_backbone':
        load_backbone(net, path)
    else:
        model = nn.Module()
        model.backbone = net
        load_weights(net if way == 'load_weights' else model, path)
    assert told_of_windows(log) == [f'{path} {WARNING}']
    assert_holds(net, weights)


def test_a_short_name_tells_the_windows_too(weights, tmp_path, log, monkeypatch):
    torch.save(dict(state_dict=weights), tmp_path / 'file.pth')
    monkeypatch.setattr('mmhybrid.weights.sources.download', lambda _: tmp_path / 'file.pth')
    load_weights(MambaVisionClassifier(TOY, num_classes=7), 'mambavision-l3-512-21k')
    assert told_of_windows(log) == [f'mambavision-l3-512-21k {WARNING}']


@pytest.mark.parametrize(('build', 'name'), [
    (lambda: MambaVisionClassifier(TOY, num_classes=7, window_size=(8, 8, 32, 16)), NAMED),
    (lambda: MambaVisionClassifier(TOY, num_classes=7, window_size=(1, 1, 32, 16)), NAMED),
    (lambda: MambaVision(TOY), NAMED),  # dense networks have windows of their own
    (lambda: MambaVision(TOY, window_size=(8, 8, 112, 56)), NAMED),
    (lambda: MambaVisionClassifier(TOY, num_classes=7), 'epoch_10.pth'),
    (lambda: MambaVisionClassifier(TOY, num_classes=7),
     'cascade_mask_rcnn_mamba_vision_tiny_3x_coco.pth'),
])
def test_nothing_is_said_of_windows_that_may_be_so(build, name, weights, tmp_path, log):
    torch.save(dict(state_dict=weights), tmp_path / name)
    load_weights(build(), tmp_path / name)
    assert not told_of_windows(log)


@pytest.mark.parametrize(('arch', 'name', 'expected'), [
    ('large3', 'mambavision-l3-512-21k', True), ('large3', 'mambavision-l3-256-21k', False),
    ('large2', 'mambavision-l2-512-21k', True), ('large2', 'mambavision-l2-1k', False),
    ('large', 'mambavision-l-21k', False), ('tiny', 'mambavision-t-1k', False)])
def test_windows_of_the_published_networks(arch, name, expected, log):
    with torch.device('meta'):
        check_windows(MambaVisionClassifier(arch), name)
        assert len(told_of_windows(log)) == expected
        check_windows(MambaVisionClassifier(arch, window_size=RELEASED[name].window_size), name)
    assert len(told_of_windows(log)) == expected


def test_pure_functions():
    module = nn.Linear(2, 3)
    state = dict(weight=torch.zeros(3, 2), bias=torch.zeros(2), head=torch.zeros(1))
    assert compare(module, state, may_differ='head') == Comparison(
        matched=['weight'], disagreeing=dict(bias=((2,), (3,))), unused=['head'], values=6,
        wanted=9)
    assert compare(module, {}).missing == ['weight', 'bias'] and compare(module, {}).share == 0
    entries = dict(model=dict(a=torch.zeros(1)), state_dict=dict(b=torch.zeros(1)))
    assert unwrap(entries) == ({'b': entries['state_dict']['b']}, 'state_dict')


def test_load_backbone_returns_what_it_did(tmp_path):
    torch.save(dict(weight=torch.ones(3, 2), bias=torch.ones(3)), tmp_path / 'w.pth')
    module = nn.Linear(2, 3)
    report = load_backbone(module, tmp_path / 'w.pth')
    assert report.comparison.share == 1 and '2 of 2 tensors, 100.0 %' in str(report)
    assert (module.weight == 1).all()
