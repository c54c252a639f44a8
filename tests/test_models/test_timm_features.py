"""Networks of timm behind our interface: maps, names, refusals."""
import re
import subprocess
import sys

import pytest
import torch

from mmhybrid.models import load_weights
from mmhybrid.registry import MODELS

timm = pytest.importorskip('timm')
SMALL = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32))


def build(**given):
    return MODELS.build(dict(dict(
        type='mmhybrid.TimmFeatures', name='convnext_tiny', settings=SMALL), **given))


@pytest.mark.parametrize('size', [(64, 96), (131, 99), (33, 47)])
def test_maps(size):
    model = build(drop_path_rate=0.2)
    assert model.out_channels == (8, 16, 24, 32) and model.out_strides == (4, 8, 16, 32)
    maps = model(torch.rand(2, 3, *size))
    for y, channels, stride in zip(maps, model.out_channels, model.out_strides, strict=True):
        # rounded down, as timm's convolutions without padding do it
        assert y.shape == (2, channels, size[0] // stride, size[1] // stride)
        assert y.is_contiguous()
        assert y.mean(dim=1).abs().max() < 1e-5  # LayerNorm over channels
    assert {getattr(model, f'outnorm{i}').eps for i in range(4)} == {1e-6}
    sum(y.square().sum() for y in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_maps_are_those_of_timm():
    model = build(out_indices=(1, 3), out_norm=False).eval()
    assert model.out_channels == (16, 32) and model.out_strides == (8, 32)
    x = torch.rand(1, 3, 64, 64)
    for got, want in zip(model(x), model.net(x), strict=True):
        assert torch.equal(got, want)


def test_weights_with_the_names_of_timm_load(tmp_path):
    source = timm.create_model('convnext_tiny', **SMALL)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    model = build(out_norm=False)
    report = load_weights(model, str(tmp_path / 'weights.pth'))
    assert report.fits, str(report)
    assert torch.equal(model.net.stages_1.blocks[1].gamma, source.stages[1].blocks[1].gamma)
    source.eval()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.eval()(x)[-1], source.stages(source.stem(x)))


def test_declared_depth():
    model = build()
    depths = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')
              for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {7}
    found = [depth for depth, _ in depths.values()]
    assert found == sorted(found) and set(found) == set(range(7))
    assert all((depth == 0) == name.startswith('net.stem') for name, (depth, _) in depths.items())
    assert all((depth == 6) == name.startswith('outnorm') for name, (depth, _) in depths.items())


@pytest.mark.parametrize('given, error, text', [
    (dict(drop_path=0.1), TypeError, "did you mean 'drop_path_rate'"),
    (dict(name='convnext_tinny'), ValueError, 'does not have'),
    (dict(name='deit_tiny_patch16_224', settings=None), ValueError, 'another form'),
    (dict(out_indices=(0, 4)), ValueError, 'builds no stages'),
    (dict(out_indices=(1, 0)), ValueError, 'ascending'),
    (dict(settings=dict(nonsense=1)), TypeError, 'nonsense'),
])
def test_refusals(given, error, text):
    with pytest.raises(error, match=text):
        build(**given)


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match=re.escape('31x64 pixels, expected at least 32')):
        build()(torch.rand(1, 3, 31, 64))


def test_the_package_needs_no_timm():
    code = ('import sys; sys.modules["timm"] = None; import mmhybrid; '
            'from mmhybrid.registry import MODELS\n'
            'try: MODELS.build(dict(type="mmhybrid.TimmFeatures", name="convnext_tiny"))\n'
            'except ImportError as error: print(error)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'needs timm, which is not installed: pip install timm' in done.stdout
