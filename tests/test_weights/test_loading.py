"""Every way to nest weights, every family, and everything that can be wrong with a file."""
import re

import pytest
import torch
from released_files import FAMILIES, NESTINGS, Hostile, dense, weights

from mmhybrid.models import load_weights
from mmhybrid.models.checkpoints import compare, load_backbone
from mmhybrid.weights import WeightsError

# What a classification file lacks and has too much for a dense backbone, by first names.
GAPS = {
    'MambaVision': ({'outnorm0', 'outnorm1', 'outnorm2', 'outnorm3'}, {'norm', 'head'}),
    'VMamba': ({'outnorm0', 'outnorm1', 'outnorm2', 'outnorm3'}, {'classifier'}),
    'LocalVMamba': ({'outnorm0', 'outnorm1', 'outnorm2', 'outnorm3'}, {'classifier'}),
    'Vim': (set(), {'norm_f', 'head'}),
    'LocalVim': ({'outnorm_0', 'layers'}, {'norm_f', 'head'}),  # layers: biases of LayerNorms
}


# torch's format before 1.6 is a sequence of pickles, which are read one by one.
FORMATS = [(nesting, False) for nesting in NESTINGS] + [('bare', True), ('timm', True)]


@pytest.fixture(scope='module')
def toys():
    """Dense networks and weights, built once."""
    return {family: (dense(family), weights(family), weights(family, other=True))
            for family in FAMILIES}


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('nesting', NESTINGS)
def test_right_file(nesting, family, toys, tmp_path):
    net, right, _ = toys[family]
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    torch.save(NESTINGS[nesting](right), tmp_path / 'w.pth.tar')
    report = load_backbone(net, tmp_path / 'w.pth.tar')
    result, own = report.comparison, net.state_dict()
    assert result.share == 1 and result.values == result.wanted
    assert not result.missing and not result.unexpected
    assert set(report.resized) == ({'pos_embed'} if family == 'Vim' else set())
    fresh, unused = GAPS[family]
    assert {name.split('.')[0] for name in result.fresh} == fresh
    assert {name.split('.')[0] for name in result.unused} == unused - {'cls_token'}
    for name in result.matched:
        # Vim's class token goes, and its row of the position embedding with it
        theirs = right[name] if name != 'pos_embed' or family != 'Vim' else torch.cat(
            [right[name][:, :98], right[name][:, 99:]], dim=1)
        assert torch.equal(own[name], theirs), name
    assert family in report.holds


# What may be absent from a file without a word: the dense form, the classification form.
FREE = {
    'MambaVision': (r'outnorm\d\.', r'\Z'), 'VMamba': (r'outnorm\d\.', r'\Z'),
    'LocalVMamba': (r'outnorm\d\.', r'\Z'), 'Vim': (r'(norm_f|fpn\d|rope)\.', r'rope\.'),
    'LocalVim': (r'(outnorm_\d|rope)\.|layers\.\d+\.norm\.bias', r'rope\.'),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_nothing_else_may_be_absent(family):
    cls, classifier, settings, _ = FAMILIES[family]
    plain = family in ('Vim', 'LocalVim')
    more = dict(rope=True) if plain else {}
    nets = (cls(**settings, **more, **dict(out_indices=(1,)) if plain else {}),
            classifier(**settings, **more, num_classes=3))
    for net, free in zip(nets, FREE[family], strict=True):
        found = compare(net, {}, net.may_differ)
        assert set(found.fresh) == {name for name in net.state_dict() if re.match(free, name)}
        assert found.missing == [name for name in net.state_dict() if name not in found.fresh]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('nesting', NESTINGS)
def test_wrong_variant(nesting, family, toys, tmp_path):
    net, _, other = toys[family]
    torch.save(NESTINGS[nesting](other), tmp_path / 'w.pth')
    refused(net, tmp_path / 'w.pth', rf'another variant, {family} .*expected {family} ')


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('nesting', NESTINGS)
def test_wrong_family(nesting, family, toys, tmp_path):
    net = toys[family][0]
    others = [other for other in FAMILIES if other != family]
    for other in others if nesting == 'state_dict' else others[len(nesting) % 4:][:1]:
        torch.save(NESTINGS[nesting](toys[other][1]), tmp_path / 'w.pth')
        refused(net, tmp_path / 'w.pth', rf'another family, {other} .*expected {family} .*'
                rf'build the model with mmhybrid\.{other}, or')


@pytest.mark.parametrize(('nesting', 'legacy'), FORMATS)
@pytest.mark.parametrize('family', FAMILIES)
def test_hostile_file(nesting, family, legacy, toys, tmp_path):
    net, right, _ = toys[family]
    checkpoint = dict(NESTINGS[nesting](right))
    checkpoint['more'] = Hostile(tmp_path / 'ran')
    torch.save(checkpoint, tmp_path / 'w.pth', _use_new_zipfile_serialization=not legacy)
    refused(net, tmp_path / 'w.pth', r'contains \w+\.mkdir, and reading that could run code')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(('nesting', 'legacy'), FORMATS)
@pytest.mark.parametrize('family', FAMILIES)
def test_truncated_file(nesting, family, legacy, toys, tmp_path):
    net, right, _ = toys[family]
    torch.save(NESTINGS[nesting](right), tmp_path / 'w.pth',
               _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / 'w.pth').read_bytes()
    for length in (100, len(content) // 2, len(content) - 8):
        (tmp_path / 'w.pth').write_bytes(content[:length])
        refused(net, tmp_path / 'w.pth', 'w.pth is cut off.*fetch it again')


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('page', ['<!DOCTYPE html><html>Sign in', '\n<html lang="en">',
                                  '<?xml version="1.0"?><Error>'])
def test_web_page(page, family, toys, tmp_path):
    (tmp_path / 'w.pth').write_text(page)
    refused(toys[family][0], tmp_path / 'w.pth', 'w.pth is a web page .*/resolve/')


def refused(net, path, message):
    """One line, and nothing changed."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone(net, path)
    assert '\n' not in str(caught.value)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_safetensors_of_every_family(toys, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    for family, (net, right, other) in toys.items():
        safetensors.save_file(right, tmp_path / 'w.safetensors')
        assert load_backbone(net, tmp_path / 'w.safetensors').comparison.share == 1
        content = (tmp_path / 'w.safetensors').read_bytes()
        for length in (20, len(content) - 3):
            (tmp_path / 'w.safetensors').write_bytes(content[:length])
            refused(net, tmp_path / 'w.safetensors', 'is cut off')
        safetensors.save_file(other, tmp_path / 'o.safetensors')
        refused(net, tmp_path / 'o.safetensors', f'another variant, {family}')


def test_position_embeddings_and_tables_are_reported(tmp_path):
    from mmhybrid.models import LocalVim
    torch.save(weights('LocalVim'), tmp_path / 'w.pth')
    net = LocalVim(**FAMILIES['LocalVim'][2], out_indices=(1,), img_size=320)
    report = load_weights(net, tmp_path / 'w.pth')
    assert report.resized == {
        'pos_embed': ((1, 196, 8), (1, 400, 8)), 'rope.freqs_cos': ((196, 8), (400, 8)),
        'rope.freqs_sin': ((196, 8), (400, 8))}
    assert 'resized       pos_embed 1x196x8 -> 1x400x8\n' in str(report)
