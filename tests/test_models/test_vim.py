"""Vim against outputs, names and shapes of the published code."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_state_dict, fill_value, make_input
from mmengine.registry import MODELS
from torch import nn

from mmhybrid.layers.mixers.directional import scan_branches
from mmhybrid.layers.mixers.vim import VimMixer
from mmhybrid.models import SimpleFPN, Vim, VimClassifier, VisionMambaSeg
from mmhybrid.ops import available_backends
from mmhybrid.ops.cross_scan import scan_plan

DATA = Path(__file__).parents[1] / 'data' / 'vim'
CASES = {case['name']: case for case in json.loads((DATA / 'manifest.json').read_text())['cases']}
KEYS = json.loads((DATA / 'keys.json').read_text())
SMALL = dict(dim=16, depth=5)
FIRST_RELEASE = dict(class_token='first', rope=True, divide=False)


def assert_near(got, name, key):
    expected = torch.from_numpy(np.load(DATA / f'{name}.npz')[key])
    noise = CASES[name]['arrays'][key].get('f32_vs_f64_maxabs', 1e-7)
    error = float((got - expected).abs().max())
    assert error <= 10 * noise, f'{name} {key}: off by {error:.2e}, allowed {10 * noise:.2e}'


def image(name):
    return make_input(CASES[name]['input_seed'], CASES[name]['input_shape'])


@pytest.mark.parametrize(('name', 'img_size'), [
    ('seg_vim_t_128_native', 128), ('seg_vim_t_128_interp', 224), ('seg_vim_t_96x160_interp', 224)])
def test_published_maps(name, img_size):
    model = fill_state_dict(Vim('tiny', img_size=img_size, feature='mixer')).eval()
    with torch.no_grad():
        maps = model(image(name))
        for i, y in enumerate(maps):
            assert y.is_contiguous()
            if f'out{i}' in CASES[name]['arrays']:
                assert_near(y, name, f'out{i}')
        if 'pos_embed_8x8' in CASES[name]['arrays']:
            torch.testing.assert_close(
                model.positions((8, 8)),
                torch.from_numpy(np.load(DATA / f'{name}.npz')['pos_embed_8x8']))


def test_published_logits_and_tokens():
    name = 'cls_vim_t_224'
    model = fill_state_dict(VimClassifier('tiny')).eval()
    with torch.no_grad():
        tokens, grid = model.embed(image(name))
        assert_near(tokens[:, 96:101], name, 'tokens_96_101')
        steps = list(model.stream(tokens, grid, 2))
        assert_near(steps[0][1][:, 96:101], name, 'layer0_hidden_96_101')
        assert_near(steps[1][0][:, 96:101], name, 'layer1_residual_96_101')
        feature = model.pooled(image(name))
        assert_near(feature, name, 'feat')
        assert_near(model.head(feature)[:, :50], name, 'logits50')


def test_published_logits_of_the_first_release():
    name = 'cls_vim_t_first_release_224'
    model = fill_state_dict(VimClassifier('tiny', **FIRST_RELEASE)).eval()
    with torch.no_grad():
        feature = model.pooled(image(name))
        assert_near(feature, name, 'feat')
        assert_near(model.head(feature)[:, :50], name, 'logits50')


COMPILED = pytest.param('cpp', marks=pytest.mark.skipif(
    not available_backends()['cpp'].usable, reason='the compiled scan needs a compiler'))


@pytest.mark.parametrize('backend', ['torch', 'reference', COMPILED])
def test_published_mixer(backend):
    name = 'mixer_vim_t_layer0'
    mixer = VimMixer(192, backend=backend)
    fill_state_dict({f'layers.0.mixer.{k}': v for k, v in mixer.state_dict().items()})
    with torch.no_grad():
        u, z = mixer.in_proj(image(name)).mT.chunk(2, dim=1)
        plan = scan_plan(mixer.directions, 1, u.shape[2])
        ys = scan_branches(u, mixer.branches(), plan, z=z, backend=backend)
        for y, key in zip(ys, ('fwd_gated', 'bwd_gated_unflipped'), strict=True):
            assert_near(y.squeeze(1).mT, name, key)
        assert_near(mixer(image(name)), name, 'y')
        mixer.divide = False
        assert_near(mixer(image(name)), name, 'y_no_divide')


@pytest.mark.parametrize('backend', [COMPILED])
@pytest.mark.parametrize(('length', 'taps'), [(1, 4), (2, 4), (3, 4), (4, 4), (9, 4), (5, 1)])
def test_tokens_of_the_compiled_scan(backend, length, taps):
    torch.manual_seed(0)
    mixer, results = VimMixer(8, conv_size=taps, backend=backend), []
    x = torch.randn(2, length, 8)
    for dtype, name in ((torch.float32, backend), (torch.float64, 'reference')):
        mixer.to(dtype).backend = name
        leaves = [x.to(dtype).requires_grad_(), *mixer.parameters()]
        y = mixer(leaves[0])
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    names = 'y', 'x', *dict(mixer.named_parameters())
    for name, got, expected in zip(names, *results, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4, msg=name)
    with torch.autocast('cpu', torch.bfloat16):
        assert float((mixer.float()(x) - results[1][0]).abs().max()) < 0.02
    assert mixer(torch.zeros(0, length, 8)).shape == (0, length, 8)


def test_no_flip_and_no_copy_of_the_sequence(monkeypatch):
    mixer, calls = VimMixer(16, backend='torch'), []
    monkeypatch.setattr(
        'mmhybrid.layers.mixers.directional.run_backend',
        lambda _, dtype, u, *rest: (calls.append((u.shape, rest[-1])) or u, None))
    mixer(torch.randn(2, 9, 16))
    assert calls == [((2, 32, 9), False), ((2, 32, 9), True)]


def test_norm_epsilon():
    model = VimClassifier('tiny')
    with torch.no_grad():
        model.norm_f.weight.copy_(torch.from_numpy(fill_value('norm_f.weight', (192,))))
        assert_near(model.norm_f(0.001 * image('rmsnorm_eps')), 'rmsnorm_eps', 'y')


# --- names and shapes ----------------------------------------------------------------------------

def shapes(module, prefix=''):
    return {prefix + k: list(v.shape) for k, v in module.state_dict().items()}


@pytest.mark.parametrize(('key', 'build'), [
    ('cls_vim_t', lambda: VimClassifier('tiny')),
    ('cls_vim_s', lambda: VimClassifier('small')),
    ('cls_vim_b', lambda: VimClassifier('base')),
    ('cls_vim_t_stride8', lambda: VimClassifier('tiny', stride=8)),
    ('cls_vim_s_stride8', lambda: VimClassifier('small', stride=8)),
    ('cls_vim_t_first_release', lambda: VimClassifier('tiny', **FIRST_RELEASE)),
    ('seg_vim_t_512', lambda: Vim('tiny', img_size=512)),
    ('seg_vim_s_512', lambda: Vim('small', img_size=512)),
    ('seg_vim_s_512_rope', lambda: Vim('small', img_size=512, rope=True)),
])
def test_names_and_shapes(key, build):
    with torch.device('meta'):
        model = build()
    assert shapes(model) == KEYS[key]['keys']
    assert sum(p.numel() for p in model.parameters()) == KEYS[key]['num_params']


@pytest.mark.parametrize(('key', 'arch', 'rope'), [
    ('det_vim_t_1024', 'tiny', False), ('det_vim_t_1024_rope', 'tiny', True),
    ('det_vim_s_1024', 'small', False), ('det_vim_b_1024', 'base', False)])
def test_names_and_shapes_of_the_detectors(key, arch, rope):
    # detectron2 keeps the trunk inside the pyramid; here they are backbone and neck
    with torch.device('meta'):
        model = Vim(arch, img_size=1024, rope=rope, pyramid=False, out_indices=(23,))
        neck = SimpleFPN(model.out_channels[0])
    assert shapes(model, 'net.') | shapes(neck) == KEYS[key]['keys']
    params = sum(p.numel() for m in (model, neck) for p in m.parameters())
    assert params == KEYS[key]['num_params']


# --- features ------------------------------------------------------------------------------------

def test_what_each_feature_is():
    x = make_input(0, (1, 3, 48, 64))
    given = dict(img_size=64, pyramid=False, out_indices=(1, 4))
    models = {
        (feature, last): Vim(SMALL, feature=feature, last=last, **given).eval()
        for feature, last in (('residual', None), ('residual', 'none'), ('residual', 'add_norm'),
                              ('mixer', None))}
    for model in models.values():
        fill_state_dict(model)
    out = {key: model(x) for key, model in models.items()}
    reference = models['mixer', None]
    tokens, grid = reference.embed(x)
    steps = list(reference.stream(tokens, grid, 5))
    streams = [stream + hidden for stream, hidden in steps]  # no rotation, eval mode
    norm = models['residual', 'add_norm'].norm_f

    def as_map(t):
        return t.mT.unflatten(2, (3, 4))

    for got, want in (
            (out['mixer', None], (steps[1][1], steps[4][1])),
            (out['residual', None], (streams[1], streams[4])),
            (out['residual', 'none'], (streams[1], steps[4][1])),
            (out['residual', 'add_norm'], (streams[1], norm(streams[4])))):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, as_map(w))


def test_residual_features_with_rotation_are_turned_once_more():
    model = Vim(SMALL, img_size=64, rope=True, pyramid=False, out_indices=(1, 2)).eval()
    fill_state_dict(model)
    x = make_input(0, (1, 3, 64, 64))
    tokens, grid = model.embed(x)
    steps = list(model.stream(tokens, grid, 5))
    for got, entering in zip(model(x), (steps[2][0], steps[3][0]), strict=True):
        torch.testing.assert_close(got, entering.mT.unflatten(2, grid))


@pytest.mark.parametrize('position', ['first', 'middle'])
def test_class_token_takes_part_and_is_not_returned(position):
    model = Vim(SMALL, img_size=64, class_token=position, rope=True, pyramid=False,
                out_indices=(4,)).eval()
    fill_state_dict(model)
    assert model.pos_embed.shape[1] == 17
    x = make_input(0, (1, 3, 48, 80))
    y, = model(x)
    assert y.shape == (1, 16, 3, 5)
    before = y.detach()
    with torch.no_grad():
        model.cls_token += 1
    assert not torch.allclose(model(x)[0], before)
    # resized positions leave the class row alone and at its place
    positions, index = model.positions((3, 5)), model.class_index((3, 5))
    assert index == {'first': 0, 'middle': 7}[position]
    built = model.class_index((4, 4))
    assert torch.equal(positions[:, index], model.pos_embed[:, built])
    cos, sin = model.rotation((3, 5))
    assert torch.all(cos[index] == 1) and torch.all(sin[index] == 0)


def test_divide_can_be_folded_into_the_weights():
    whole = Vim(SMALL, divide=False, img_size=64, pyramid=False, out_indices=(4,)).eval()
    half = Vim(SMALL, divide=True, img_size=64, pyramid=False, out_indices=(4,)).eval()
    fill_state_dict(whole)
    half.load_state_dict({k: v * 2 if 'out_proj' in k else v
                          for k, v in whole.state_dict().items()})
    x = make_input(1, (1, 3, 64, 64))
    assert torch.equal(whole(x)[0], half(x)[0])


@pytest.mark.parametrize(('stride', 'sides'), [(16, (32, 16, 8, 4)), (8, (30, 15, 7, 3))])
def test_pyramid_of_each_stride(stride, sides):
    model = Vim(SMALL, stride=stride, out_indices=(0, 1, 2, 3)).eval()
    maps = model(torch.rand(1, 3, 128, 128))
    assert tuple(m.shape[-1] for m in maps) == sides
    assert model.out_strides == (4, 8, 16, 32) and model.out_channels == (16,) * 4
    one = Vim(SMALL, stride=stride, out_indices=(2,)).eval()
    assert len(one(torch.rand(1, 3, 128, 128))) == 4


def test_the_class_token_belongs_to_the_embedding():
    model = Vim(SMALL, class_token='middle', frozen_stages=0, img_size=64, out_indices=(4,))
    assert not model.cls_token.requires_grad and not model.pos_embed.requires_grad
    assert model.get_layer_depth('backbone.cls_token', 'backbone.') == (0, 7)


def test_fresh_embeddings():
    model = VimClassifier(dict(dim=192, depth=1))
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    assert weight.std().item() == pytest.approx(768 ** -0.5, rel=0.01) and not bias.any()
    assert 0.0815 < weight.abs().max() <= 0.0821  # cut at two sigma
    for tokens, noise in ((model.pos_embed, 0.02), (model.cls_token, 0.2)):
        assert tokens.std().item() == pytest.approx(0.02, rel=noise)


def test_stochastic_depth_is_shifted_by_one_block():
    model = VimClassifier(dict(dim=16, depth=5), drop_path_rate=0.4)
    rates = [getattr(block.drop_path, 'rate', 0) for block in model.layers]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3])
    assert model.drop_path.rate == 0.4
    assert isinstance(model.layers[1].drop_path, nn.Identity)


# --- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(('row', 'key'), [
    ('first', 'official_drop_index0'), ('middle', 'midtoken_aware_drop_index98')])
def test_class_row_of_a_file(row, key):
    model = Vim(dict(dim=192, depth=1), img_size=128, out_indices=(0,), dropped_row=row)
    rows = torch.from_numpy(fill_value('pos_embed', (1, 197, 192))).float()
    adapted = model.adapt_state_dict(
        {'pos_embed': rows, 'cls_token': torch.zeros(1, 1, 192),
         'rope.freqs_cos': torch.zeros(196, 192), 'rope.freqs_sin': torch.zeros(196, 192)})
    assert set(adapted) == {'pos_embed'}
    golden = torch.from_numpy(np.load(DATA / 'loader_pos_embed_197_to_8x8.npz')[key])
    torch.testing.assert_close(adapted['pos_embed'], golden)


def test_classification_file_starts_a_segmentor(tmp_path):
    source = VimClassifier(SMALL, num_classes=7, img_size=64)
    torch.save({'model': source.state_dict(), 'epoch': 3}, tmp_path / 'vim.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'vim.pth'))
    model = Vim(SMALL, img_size=96, out_indices=(1, 2, 3, 4), init_cfg=init)
    model.init_weights()
    for name, tensor in source.state_dict().items():
        if name.startswith(('layers', 'patch_embed', 'norm_f')):
            assert torch.equal(model.state_dict()[name], tensor), name
    without = torch.cat([source.pos_embed[:, :8], source.pos_embed[:, 9:]], dim=1)
    expected = nn.functional.interpolate(
        without.mT.reshape(1, 16, 4, 4), size=(6, 6), mode='bicubic').flatten(2).mT
    torch.testing.assert_close(model.pos_embed, expected)


def test_class_row_and_tables_of_another_grid():
    source = VimClassifier(SMALL, num_classes=3, img_size=64, class_token='first', rope=True)
    model = VimClassifier(SMALL, num_classes=3, img_size=96, class_token='first', rope=True)
    adapted = model.adapt_state_dict(source.state_dict())
    assert torch.equal(adapted['pos_embed'][:, 0], source.pos_embed[:, 0])
    # unlike LocalVim's, tables are those of the model's own grid
    assert torch.equal(adapted['rope.freqs_sin'], model.rope.freqs_sin)


def test_a_file_of_an_oblong_grid_is_refused(tmp_path):
    torch.save(Vim(SMALL, img_size=(48, 80), out_indices=(4,)).state_dict(), tmp_path / 'w.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'))
    model = Vim(SMALL, img_size=64, out_indices=(4,), init_cfg=init)
    with pytest.raises(ValueError, match='1 have another shape .first: pos_embed is'):
        model.init_weights()


def test_own_files_come_back_unchanged():
    for given in (dict(), dict(class_token='middle'), dict(class_token='first', rope=True)):
        model = fill_state_dict(Vim(SMALL, img_size=80, out_indices=(0, 1, 2, 4), **given))
        holder = nn.Module()
        holder.backbone = Vim(SMALL, img_size=80, out_indices=(0, 1, 2, 4), **given)
        holder.load_state_dict({f'backbone.{k}': v for k, v in model.state_dict().items()})
        for name, tensor in model.state_dict().items():
            assert torch.equal(holder.backbone.state_dict()[name], tensor), name


# --- the published segmentation dictionary ------------------------------------------------------

SEG_TINY = dict(img_size=512, patch_size=16, embed_dim=192, depth=24, out_indices=[5, 11, 17, 23],
                pretrained=None, rms_norm=True, residual_in_fp32=False, fused_add_norm=True,
                if_abs_pos_embed=True, if_rope=False, if_rope_residual=False, bimamba_type='v2',
                final_pool_type='all', if_divide_out=True, if_cls_token=False)
SEG_SMALL = dict(SEG_TINY, embed_dim=384, if_rope=True, if_rope_residual=True, if_cls_token=True,
                 use_residual_as_feature=True, last_layer_process='add')


@pytest.mark.parametrize(('settings', 'key', 'feature', 'row'), [
    (SEG_TINY, 'seg_vim_t_512', 'mixer', 'middle'),
    (SEG_SMALL, 'seg_vim_s_512_rope', 'residual', 'first')])
def test_published_settings_build(settings, key, feature, row):
    with torch.device('meta'), pytest.warns(UserWarning, match='have no effect') as caught:
        model = MODELS.build(dict(type='VisionMambaSeg', **settings))
    ours = [str(w.message) for w in caught if 'VisionMambaSeg' in str(w.message)]
    assert len(ours) == 1 and "final_pool_type='all'" in ours[0]
    assert shapes(model) == KEYS[key]['keys']
    assert (model.feature, model.last, model.dropped_row) == (feature, 'add', row)


def test_published_settings_without_a_model_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match="bimamba_type='v1'"):
            VisionMambaSeg(**SEG_TINY | dict(bimamba_type='v1'))
        with pytest.raises(TypeError, match="'if_ropes'; did you mean 'if_rope'"):
            VisionMambaSeg(**SEG_TINY, if_ropes=True)


@pytest.mark.parametrize(('given', 'message'), [
    (dict(stride=4), 'stride=4, expected 16, or 8'),
    (dict(feature='hidden'), "feature='hidden', expected 'residual' or 'mixer'"),
    (dict(last='add', feature='mixer'), "last='add', which acts on"),
    (dict(out_indices=(1, 2)), 'expected four, or one'),
    (dict(out_indices=(5, 11, 17, 24)), 'expected an integer from 0 to 23'),
    (dict(class_token='last'), "class_token='last'"),
    (dict(dropped_row='last'), "dropped_row='last'"),
    (dict(arch=dict(dim=18, depth=2)), 'multiple of 4'),
    (dict(img_size=(224, 224, 3)), 'expected one side or'),
])
def test_errors(given, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        Vim(**given)
