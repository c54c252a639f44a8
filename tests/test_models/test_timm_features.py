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


TOKENS = dict(depth=4, embed_dim=32, num_heads=2)
STAGES = dict(depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 1, 2, 2))
# settings, requested maps, their channels and strides, and their sides for 75x101 pixels
NETWORKS = {
    'swin_tiny_patch4_window7_224': (
        STAGES, (0, 1, 2, 3), (24, 48, 96, 192), (4, 8, 16, 32),
        ((19, 26), (10, 13), (5, 7), (3, 4))),
    'swinv2_tiny_window8_256': (STAGES, (1, 3), (48, 192), (8, 32), ((10, 13), (3, 4))),
    'mambaout_tiny': (
        dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 40)), (0, 1, 2, 3), (16, 24, 32, 40),
        (4, 8, 16, 32), ((19, 26), (10, 13), (5, 7), (3, 4))),
    'resnet10t': (None, (1, 4), (64, 512), (4, 32), ((19, 26), (3, 4))),
    'deit_tiny_patch16_224': (
        TOKENS, (0, 1, 2, 3), (32,) * 4, (16,) * 4, ((5, 7),) * 4),
    'deit_tiny_distilled_patch16_224': (TOKENS, (1, 3), (32,) * 2, (16,) * 2, ((5, 7),) * 2),
    'eva02_tiny_patch14_224': (TOKENS, (1, 3), (32,) * 2, (14,) * 2, ((6, 8),) * 2),
    'eva_giant_patch14_224': (TOKENS, (3,), (32,), (14,), ((6, 8),)),
    'vit_small_patch16_224': (TOKENS, (3,), (32,), (16,), ((5, 7),)),  # DINO's
    'vit_small_patch14_dinov2': (TOKENS, (1, 3), (32,) * 2, (14,) * 2, ((6, 8),) * 2),
    'vit_small_patch14_reg4_dinov2': (TOKENS, (3,), (32,), (14,), ((6, 8),)),
    'vit_small_patch16_dinov3': (TOKENS, (1, 3), (32,) * 2, (16,) * 2, ((5, 7),) * 2),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_in_every_form(name):
    settings, indices, channels, strides, sides = NETWORKS[name]
    model = build(name=name, settings=settings, out_indices=indices, drop_path_rate=0.1)
    assert model.out_channels == channels and model.out_strides == strides
    maps = model(torch.rand(2, 3, 75, 101))
    assert [y.shape for y in maps] == [
        (2, c, *side) for c, side in zip(channels, sides, strict=True)]
    assert all(y.is_contiguous() for y in maps)
    assert all(y.mean(dim=1).abs().max() < 1e-5 for y in maps)  # channels are in their place
    sum(y.square().sum() for y in maps).backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None]
    assert idle == [] or name == 'eva_giant_patch14_224' and all('norm' in key for key in idle)


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_maps_of_timms_own_size_are_those_of_timm(name):
    """What lets a network take any size changes nothing at the size that it was made for."""
    settings = NETWORKS[name][0]
    torch.manual_seed(0)
    source = timm.create_model(name, **settings).eval()
    model = build(name=name, settings=settings, out_indices=(0, 3), out_norm=False).eval()
    report = load_weights_of(model, source)
    assert report.fits and not report.comparison.missing, str(report)
    x = torch.rand(1, 3, 224, 224)
    wanted = source.forward_intermediates(x, indices=[0, 3], intermediates_only=True)
    for got, want in zip(model(x), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def load_weights_of(model, source):
    from mmhybrid.models.checkpoints import fit_weights
    fitted, report = fit_weights(model, dict(model=source.state_dict()), 'file')
    model.load_state_dict(fitted, strict=False)
    return report


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_position_embedding_of_a_file_fits_another_size(name):
    source = timm.create_model(name, **TOKENS)
    prefix = source.num_prefix_tokens
    grid = torch.linspace(-1, 1, 14)
    with torch.no_grad():  # a plane stays one when it is resized, but for its edges
        source.pos_embed[:, prefix:, 0] = (grid[:, None] + 2 * grid).flatten()
    model = build(name=name, settings=dict(TOKENS, img_size=448), out_indices=(3,))
    assert load_weights_of(model, source).fits
    ours = model.net.model.pos_embed.detach()
    assert ours.shape == (1, prefix + 28 * 28, 32)
    assert torch.equal(ours[:, :prefix], source.pos_embed[:, :prefix])
    fine = (torch.arange(28) + 0.5) / 2 - 0.5
    plane = (2 * fine / 13 - 1)[:, None] + 2 * (2 * fine / 13 - 1)
    found = ours[0, prefix:, 0].reshape(28, 28)
    torch.testing.assert_close(found[4:-4, 4:-4], plane[4:-4, 4:-4], atol=1e-4, rtol=0)


def test_a_network_of_one_size_says_so():
    model = build(name='beit_base_patch16_224', settings=TOKENS, out_indices=(3,))
    assert model(torch.rand(1, 3, 224, 224))[0].shape == (1, 32, 14, 14)
    with pytest.raises(ValueError, match=r'64x96 pixels, which this network .*img_size=\(height'):
        model(torch.rand(1, 3, 64, 96))
    sized = build(name='beit_base_patch16_224', settings=dict(TOKENS, img_size=(64, 96)),
                  out_indices=(3,))
    assert sized(torch.rand(1, 3, 64, 96))[0].shape == (1, 32, 4, 6)


@pytest.mark.parametrize('name, depths', [
    ('deit_tiny_patch16_224', {'pos_embed': 0, 'patch_embed.proj.weight': 0,
                               'blocks.0.attn.qkv.weight': 1, 'blocks.3.mlp.fc2.bias': 4}),
    ('swin_tiny_patch4_window7_224', {
        'patch_embed.proj.weight': 0, 'layers_0.blocks.0.norm1.weight': 1,
        'layers_1.downsample.norm.weight': 1, 'layers_2.blocks.1.norm1.weight': 4})])
def test_declared_depth_of_other_forms(name, depths):
    model = build(name=name, settings=NETWORKS[name][0])
    inner = 'net.model.' if 'deit' in name else 'net.'
    for key, depth in depths.items():
        total = 6 if 'deit' in name else 7
        assert model.get_layer_depth(f'backbone.{inner}{key}', 'backbone.') == (depth, total)
    assert model.get_layer_depth('backbone.outnorm3.weight', 'backbone.')[0] == total - 1


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
    (dict(name='deit_tiny_patch16_224', settings=None, out_indices=(3, 12)), ValueError,
     'builds no maps'),
    (dict(out_indices=(0, 4)), ValueError, 'builds no maps'),
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
