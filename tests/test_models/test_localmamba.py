"""LocalVMamba and LocalVim against outputs, names and shapes of the published code."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_state_dict, make_input
from mmengine.registry import MODELS

from mmhybrid.layers.direction_merge import ChannelAttention, DirectionMixture
from mmhybrid.layers.mixers.localvim import LocalVimMixer
from mmhybrid.layers.mixers.ss2d import LocalSS2D
from mmhybrid.layers.rope import Rope2d, resize_grid, rotate
from mmhybrid.models import (
    LocalVim,
    LocalVimClassifier,
    LocalVMamba,
    LocalVMambaClassifier,
    MM_LocalVim,
    MM_LocalVSSM,
)
from mmhybrid.models.backbones import local_directions

DATA = Path(__file__).parents[1] / 'data' / 'localmamba'
CASES = {case['name']: case for case in json.loads((DATA / 'manifest.json').read_text())['cases']}
KEYS = json.loads((DATA / 'keys.json').read_text())
MODULES = CASES['modules']['cases']
PLAIN = [('h', 'h_flip', 'v', 'w2'), ('v_flip', 'w2_flip', 'w7', 'w7_flip')]


def image(name):
    return make_input(CASES[name]['input']['seed'], CASES[name]['input']['shape'])


def assert_near(got, expected, noise, what):
    error = float((got - torch.from_numpy(expected)).abs().max())
    assert error <= 10 * noise, f'{what}: off by {error:.2e}, allowed {10 * noise:.2e}'


def restores(name):
    """Golden prefixes with the restore that they were made with."""
    stored = np.load(DATA / f'{name}.npz')
    yield 'released', 'out'
    yield 'exact', 'vfixed_out' if 'vfixed_out0' in stored.files else 'out'


@pytest.mark.parametrize('name', ['localvmamba_t_128x96', 'localvmamba_t_64x64',
                                  'localvim_t_112x112', 'localvim_t_100x52'])
def test_published_maps(name):
    golden, config = np.load(DATA / f'{name}.npz'), CASES[name]['config']
    for restore, prefix in restores(name):
        model = (LocalVMamba if 'vmamba' in name else LocalVim)('tiny', v_restore=restore).eval()
        assert [list(d) for d in model.directions] == config['directions']
        fill_state_dict(model)
        with torch.no_grad():
            maps = model(image(name))
        for i, y in enumerate(maps):
            assert y.is_contiguous()
            assert_near(y, golden[f'{prefix}{i}'], CASES[name]['f32_vs_f64_maxabs'][i],
                        f'{restore} map {i}')


@pytest.mark.parametrize(('name', 'build'), [
    ('localvmamba_t_cls_64x64', lambda: LocalVMambaClassifier('tiny')),
    ('localvim_t_cls_224', lambda: LocalVimClassifier('tiny')),
    ('localvim_t_midcls_224', lambda: LocalVimClassifier('tiny', class_token=True))])
def test_published_logits(name, build):
    model = fill_state_dict(build()).eval()
    with torch.no_grad():
        logits = model(image(name))
    assert_near(logits, np.load(DATA / f'{name}.npz')['logits'],
                CASES[name]['f32_vs_f64_maxabs'][0], 'logits')


@pytest.mark.parametrize('restore', ['released', 'exact'])
@pytest.mark.parametrize('name', MODULES)
def test_published_modules(name, restore):
    given, golden = MODULES[name]['kwargs'], np.load(DATA / 'modules.npz')
    inputs = [torch.from_numpy(golden[f'{name}/input'])]
    if name.startswith('ss2d'):
        prefix, module = 'op.', LocalSS2D(
            given['d_model'], given['directions'], state_dim=given['d_state'],
            ratio=given['ssm_ratio'], conv_bias=True, v_restore=restore)
    elif name.startswith('multimamba'):
        inputs.append(tuple(given['token_size']))
        prefix, module = 'mixer.', LocalVimMixer(
            given['d_model'], given['directions'], v_restore=restore,
            class_token=given.get('use_middle_cls_token', False))
    else:
        prefix, module = 'attn.', ChannelAttention(given['in_channels'])
    state = {prefix + k: v for k, v in module.state_dict().items()}
    assert {k: list(v.shape) for k, v in state.items()} == dict(MODULES[name]['state_dict'])
    fill_state_dict(state)
    with torch.no_grad():
        y = module(*inputs)
    expected = torch.from_numpy(
        golden[f'{name}/output' + ('_vfixed' if restore == 'exact' else '')])
    large = MODULES[name].get('input_scale', 1) > 1
    # values up to 2e5, and sums of them that nearly vanish
    torch.testing.assert_close(y, expected, rtol=1e-4 if large else 1e-5,
                               atol=max(2e-5, 1e-6 * float(expected.abs().max())))


def test_published_tables_and_resizing():
    golden = np.load(DATA / 'modules.npz')
    rope = Rope2d(24, (6, 6))
    for name in ('freqs_cos', 'freqs_sin'):
        torch.testing.assert_close(getattr(rope, name),
                                   torch.from_numpy(golden[f'rope_6of14/{name}']))
    turned = rotate(torch.from_numpy(golden['rope_6of14/input']), *rope((6, 6)))
    torch.testing.assert_close(turned, torch.from_numpy(golden['rope_6of14/output']))
    rows = torch.from_numpy(golden['pos_resize/input_14x14'])
    for size in ((32, 32), (6, 10), (7, 7), (14, 14)):
        expected = torch.from_numpy(golden[f'pos_resize/{size[0]}x{size[1]}'])
        torch.testing.assert_close(resize_grid(rows, (14, 14), size), expected)


# --- names, shapes, directions -------------------------------------------------------------------

def shapes(module):
    return {k: list(v.shape) for k, v in module.state_dict().items()}


@pytest.mark.parametrize(('key', 'build'), [
    ('local_vim_tiny_cls', lambda: LocalVimClassifier('tiny')),
    ('local_vim_small_cls', lambda: LocalVimClassifier('small', directions='unsearched')),
    ('local_vim_tiny_middle_cls_token_cls', lambda: LocalVimClassifier('tiny', class_token=True)),
    ('local_vim_tiny_search_cls',
     lambda: LocalVimClassifier(dict(dim=128, depth=20), directions=None)),
    ('local_vim_tiny_dense_seg', lambda: LocalVim('tiny', img_size=512)),
    ('local_vim_small_dense_seg', lambda: LocalVim('small', img_size=512)),
    ('local_vim_tiny_dense_det', lambda: LocalVim('tiny', img_size=1024, out_indices=(19,))),
    ('local_vim_small_dense_det', lambda: LocalVim('small', img_size=1024, out_indices=(19,))),
    ('local_vssm_tiny_cls', lambda: LocalVMambaClassifier('tiny')),
    ('local_vssm_small_cls', lambda: LocalVMambaClassifier('small')),
    ('local_vssm_tiny_dense', lambda: LocalVMamba('tiny')),
    ('local_vssm_small_dense', lambda: LocalVMamba('small')),
    ('local_vssm_tiny_search_cls', lambda: LocalVMambaClassifier(
        dict(dim=32, depths=(2, 2, 9, 2)), directions=None)),
    ('local_vssm_small_search_cls', lambda: LocalVMambaClassifier(
        dict(dim=32, depths=(2, 2, 27, 2)), directions=None)),
])
def test_names_and_shapes(key, build):
    with torch.device('meta'):
        model = build()
    assert shapes(model) == KEYS[key]['keys']
    assert sum(p.numel() for p in model.parameters()) == KEYS[key]['num_params']
    given = KEYS[key]['config']['directions']
    if given is not None and 'search' not in key:
        assert [list(names) for names in model.directions] == given


def test_each_direction_has_its_own_tensors():
    mixer = LocalVimMixer(8, PLAIN[0])
    assert len({mixer.get_parameter(f'A_log_{k}').data_ptr() for k in range(4)}) == 4


def test_supernet_learns_its_shares():
    shares = DirectionMixture(8)
    assert shares().sum().item() == pytest.approx(1)
    model = LocalVMamba(dict(dim=8, depths=(1, 1, 1, 1)), directions=None, drop_path_rate=0.)
    sum((y * torch.randn_like(y)).sum() for y in model(torch.rand(1, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        if name.endswith('multi_scan.weights'):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(('given', 'error', 'message'), [
    (dict(directions=[['h', 'x']] * 20), ValueError, "unknown scan direction 'x'"),
    (dict(directions=[['h']] * 3), ValueError, 'directions for 3 blocks, expected 20'),
    (dict(directions='best'), ValueError, "'searched', 'unsearched'"),
    (dict(directions=['h', 'v']), TypeError, 'one list of names per block'),
    (dict(arch=dict(dim=8, depth=3)), ValueError, 'for 3 blocks, for which none have been'),
    (dict(v_restore='fixed'), ValueError, "'exact' or 'released', got 'fixed'"),
    (dict(norm='bn'), ValueError, "norm='bn', expected 'ln' or 'rms'"),
])
def test_errors(given, error, message):
    with torch.device('meta'), pytest.raises(error, match=message):
        LocalVim(**given)


def test_lists_are_in_canonical_order():
    order = {name: i for i, name in enumerate(
        ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip'))}
    for table in (local_directions.LOCAL_VIM, local_directions.LOCAL_VMAMBA_TINY,
                  local_directions.LOCAL_VMAMBA_SMALL):
        for names in table:
            assert len(names) == 4 and list(names) == sorted(names, key=order.get)


# --- files ---------------------------------------------------------------------------------------

def test_classification_file_of_another_grid_and_norm(tmp_path):
    arch = dict(dim=16, depth=2)
    source = LocalVimClassifier(arch, num_classes=5, directions=PLAIN, img_size=64)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'local.ckpt')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'local.ckpt'))
    model = LocalVim(arch, directions=PLAIN, img_size=96, out_indices=(1,), init_cfg=init)
    model.init_weights()
    state = model.state_dict()
    for name, tensor in source.state_dict().items():
        if name.startswith(('layers', 'patch_embed')):
            assert torch.equal(state[name], tensor), name
    assert torch.equal(state['layers.0.norm.bias'], torch.zeros(16))
    # tables are resized with the position embedding, not computed anew
    for name in ('pos_embed', 'rope.freqs_cos', 'rope.freqs_sin'):
        torch.testing.assert_close(
            state[name], resize_grid(source.state_dict()[name], (4, 4), (6, 6)))
    assert not torch.allclose(state['rope.freqs_cos'], Rope2d(16, (6, 6)).freqs_cos, atol=1e-3)


def test_file_of_the_other_family_is_refused(tmp_path):
    # the released LocalVim-S segmentor names a LocalVMamba file and starts from noise
    source = LocalVMambaClassifier(dict(dim=8, depths=(1, 1, 1, 1)), directions='unsearched')
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'local_vssm_small.ckpt')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'local_vssm_small.ckpt'))
    model = LocalVim(dict(dim=16, depth=2), directions=PLAIN, out_indices=(1,), init_cfg=init)
    with pytest.raises(ValueError, match='another family, LocalVMamba .*expected LocalVim'):
        model.init_weights()


# --- the published configs' spelling -------------------------------------------------------------

VSSM = dict(dims=[96, 192, 384, 768], depths=(2, 2, 9, 2), ssm_d_state=16, ssm_dt_rank='auto',
            ssm_ratio=2.0, mlp_ratio=0.0, downsample_version='v1', patchembed_version='v1',
            drop_path_rate=0.2, patch_norm=True, out_indices=(0, 1, 2, 3), pretrained='',
            directions=[list(d) for d in local_directions.LOCAL_VMAMBA_TINY])
FROM_SWIN = dict(embed_dims=96, num_heads=[3, 6, 12, 24], window_size=7, qkv_bias=True,
                 qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0, with_cp=False,
                 convert_weights=True, init_cfg=None)
VIM = dict(img_size=[1024, 1024], patch_size=16, embed_dim=192, depth=20, rms_norm=False,
           residual_in_fp32=True, fused_add_norm=False, final_pool_type='mean',
           if_abs_pos_embed=True, if_rope=True, if_rope_residual=True, bimamba_type='v2',
           directions=[list(d) for d in local_directions.LOCAL_VIM], out_indices=[19],
           drop_path_rate=0.1, pretrained_ckpt=None)


@pytest.mark.parametrize(('type_', 'settings', 'ignored', 'key'), [
    ('MM_LocalVSSM', VSSM | FROM_SWIN, FROM_SWIN, 'local_vssm_tiny_dense'),
    ('MM_LocalVim', VIM, ['final_pool_type'], 'local_vim_tiny_dense_det')])
def test_published_settings_build(type_, settings, ignored, key):
    with torch.device('meta'), pytest.warns(UserWarning, match='have no effect') as caught:
        model = MODELS.build(dict(type=type_, **settings))
    ours = [str(w.message) for w in caught if type_ in str(w.message)]
    assert len(ours) == 1 and all(f'{name}=' in ours[0] for name in ignored)
    assert shapes(model) == KEYS[key]['keys']
    assert [list(names) for names in model.directions] == settings['directions']


def test_arguments_with_one_released_value():
    with torch.device('meta'):
        for size in ('tiny', 'small'):
            published = KEYS[f'local_vssm_{size}_dense']
            model = MM_LocalVSSM(**published['config'], ssm_init='v0', mlp_act_layer='gelu')
            assert shapes(model) == published['keys']
        for change in (dict(ssm_act_layer='gelu'), dict(ssm_init='v2'), dict(mlp_act_layer='silu')):
            with pytest.raises(ValueError, match=f'got {next(iter(change))}=.*no released model'):
                MM_LocalVSSM(**VSSM | change)


def test_published_settings_give_the_same_function():
    x = torch.randn(1, 3, 52, 80)
    two = [list(names) for names in PLAIN]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pairs = [
            (MM_LocalVSSM(**VSSM | dict(dims=8, depths=(1, 1, 1, 1), directions=two * 2)),
             LocalVMamba(dict(dim=8, depths=(1, 1, 1, 1)), directions=two * 2,
                         v_restore='released')),
            (MM_LocalVim(**VIM | dict(embed_dim=16, depth=2, directions=two, out_indices=[1],
                                      img_size=64)),
             LocalVim(dict(dim=16, depth=2), directions=two, out_indices=(1,), img_size=64,
                      v_restore='released'))]
    for dropin, ours in pairs:
        ours.eval().load_state_dict(dropin.eval().state_dict())
        with torch.no_grad():
            for a, b in zip(dropin(x), ours(x), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(('name', 'build'), [
    ('localvmamba_t_128x96', lambda: MM_LocalVSSM(**VSSM)),
    ('localvim_t_100x52', lambda: MM_LocalVim(
        **VIM | dict(img_size=224, out_indices=(4, 9, 14, 19))))])
def test_dropins_give_what_was_released_on_maps_that_are_not_square(name, build):
    golden = np.load(DATA / f'{name}.npz')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = fill_state_dict(build()).eval()
    with torch.no_grad():
        for i, y in enumerate(model(image(name))):
            assert_near(y, golden[f'out{i}'], CASES[name]['f32_vs_f64_maxabs'][i], f'map {i}')


# --- the column restore is told ------------------------------------------------------------------

@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(local_directions, 'print_log', lambda text, **_: lines.append(text))
    return lines


SMALL_VSSM = dict(dims=8, depths=(1, 1, 1, 1))
SMALL_VIM = dict(embed_dim=16, depth=2, out_indices=(1,), img_size=32)
SMALL = {
    'MM_LocalVSSM': lambda lists: MM_LocalVSSM(directions=lists * 2, **SMALL_VSSM),
    'MM_LocalVim': lambda lists: MM_LocalVim(directions=lists, **SMALL_VIM),
    'LocalVMamba': lambda lists: LocalVMamba(
        dict(dim=8, depths=(1, 1, 1, 1)), directions=lists and lists * 2),
    'LocalVim': lambda lists: LocalVim(
        dict(dim=16, depth=2), directions=lists, out_indices=(1,), img_size=32),
    'LocalVMambaClassifier': lambda lists: LocalVMambaClassifier(
        dict(dim=8, depths=(1, 1, 1, 1)), directions=lists and lists * 2),
    'LocalVimClassifier': lambda lists: LocalVimClassifier(
        dict(dim=16, depth=2), directions=lists, img_size=32),
}


def run(model, *sizes):
    with torch.no_grad():
        for height, width in sizes:
            model.eval()(torch.rand(1, 3, height, width))


@pytest.mark.parametrize('name', SMALL)
def test_the_column_restore_is_told_once_and_only_where_it_matters(name, told):
    model = SMALL[name]([list(names) for names in PLAIN])
    run(model, (32, 32), (64, 64))
    assert not told
    run(model, (32, 64), (64, 32), (32, 96), (32, 32))
    size = '2 x 4' if 'Vim' in name else '8 x 16'
    how = ("on wrong pixels, as the published code does; v_restore='exact' puts them right"
           if name.startswith('MM_') else
           "back exactly; the published code puts them on wrong pixels, which v_restore='released' "
           'repeats')
    assert told == [f'{name}: column scans of maps that are not square (the first one is {size}) '
                    f'are put {how}.']


@pytest.mark.parametrize(('name', 'lists', 'sizes'), [
    ('MM_LocalVim', [['h', 'w2'], ['h_flip', 'w7_flip']], [(32, 64)]),  # nothing by columns
    ('LocalVMamba', [['h', 'w2'], ['h_flip', 'w7_flip']], [(32, 64)]),
    ('MM_LocalVim', [['v'], ['v_flip']], [(16, 64), (64, 16)]),  # a line has one order
    ('MM_LocalVim', [['v'], ['v_flip']], [(20, 32)]),  # padded to a square map
    ('MM_LocalVSSM', [['v'], ['v_flip']], [(32, 34)]),  # cut to a square map
])
def test_nothing_is_told_where_both_restores_agree(name, lists, sizes, told):
    model = SMALL[name](lists)
    run(model, *sizes)
    assert not told
    other = SMALL[name](lists)
    other.load_state_dict(model.state_dict())
    for mixer in (each for each in other.modules() if isinstance(each, (LocalSS2D, LocalVimMixer))):
        mixer.v_restore = {'exact': 'released', 'released': 'exact'}[mixer.v_restore]
    for size in sizes:
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            for a, b in zip(model(x), other.eval()(x), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize('name', ['LocalVMamba', 'LocalVim'])
def test_a_network_that_searches_scans_columns_too(name, told):
    run(SMALL[name](None), (32, 64))
    assert len(told) == 1 and told[0].startswith(f'{name}: column scans')


def test_directions_are_required_by_name():
    with pytest.raises(TypeError, match='directions'):
        MM_LocalVSSM(dims=96)
