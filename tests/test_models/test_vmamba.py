"""VMamba against outputs, names and shapes of the published code."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_state_dict, make_input
from mmengine.registry import MODELS

from mmhybrid.layers.mixers.ss2d import SS2D
from mmhybrid.models import MM_VSSM, VMamba, VMambaClassifier
from mmhybrid.models.backbones.vmamba import ARCHITECTURES

DATA = Path(__file__).parents[1] / 'data' / 'vmamba'
CASES = {case['name']: case for case in json.loads((DATA / 'manifest.json').read_text())['cases']}
KEYS = json.loads((DATA / 'keys.json').read_text())
MODULE_CASES = CASES['ss2d_only']['cases']
# Differences between float32 and float64 of the published code, as the manifest has them; where
# it says nothing, what similar cases have.
NOISE = 7.5e-6


def golden_input(case):
    entry = case['input']
    if entry.get('zeros'):
        return torch.zeros(entry['shape'])
    return make_input(entry['seed'], entry['shape'])


def assert_near(got, expected, noise, what):
    error = float((got - torch.from_numpy(expected)).abs().max())
    assert error <= 10 * noise, f'{what}: off by {error:.2e}, allowed {10 * noise:.2e}'


@pytest.mark.parametrize(('name', 'arch'), [
    ('vmamba_t_128x96', 'tiny'), ('vmamba_t_zero_64x64', 'tiny'), ('vmamba_v0_t_60x76', 'v0_tiny')])
def test_published_maps(name, arch):
    golden = np.load(DATA / f'{name}.npz')
    model = fill_state_dict(VMamba(arch)).eval()
    seen = {}
    for key, module in (('patch_embed', model.patch_embed),
                        ('layers0_blocks0', model.layers[0].blocks[0])):
        # a block leaves its last sum to the next one
        module.register_forward_hook(lambda _, __, y, key=key: seen.update(
            {key: sum(y) if isinstance(y, tuple) else y}))
    with torch.no_grad():
        maps = model(golden_input(CASES[name]))
    noise = CASES[name].get('f32_vs_f64_maxabs', [NOISE] * 4)
    for i, y in enumerate(maps):
        assert y.is_contiguous()
        assert_near(y, golden[f'out{i}'], noise[i], f'map {i}')
    for key in set(seen) & set(golden.files):
        assert_near(seen[key], golden[key], noise[0], key)


def test_published_logits():
    case = CASES['vmamba_t_cls_64x64']
    model = fill_state_dict(VMambaClassifier('tiny')).eval()
    with torch.no_grad():
        logits = model(golden_input(case))
    assert_near(logits, np.load(DATA / case['file'])['logits'], case['f32_vs_f64_maxabs'][0],
                'logits')


@pytest.mark.parametrize('name', MODULE_CASES)
def test_published_mixer(name):
    case = MODULE_CASES[name]
    golden = np.load(DATA / 'ss2d_only.npz')
    given = case['kwargs']
    mixer = SS2D(given['d_model'], state_dim=given['d_state'], ratio=given['ssm_ratio'],
                 conv_bias=given['conv_bias'], channel_first=given['channel_first'],
                 gate='noz' not in given['forward_type'],
                 float32_scan=given['forward_type'] == 'v0')
    assert {f'op.{k}': list(v.shape) for k, v in mixer.state_dict().items()} == dict(
        case['state_dict'])
    fill_state_dict({f'op.{k}': v for k, v in mixer.state_dict().items()})
    merged = []
    mixer.out_norm.register_forward_hook(lambda _, args, __: merged.append(args[0]))
    x = torch.from_numpy(golden[f'{name}/input'])
    with torch.no_grad():
        y = mixer(x)
    rtol = 1e-4 if case['input_scale'] > 1 else 1e-5
    torch.testing.assert_close(y, torch.from_numpy(golden[f'{name}/output']), rtol=rtol, atol=2e-5)
    if f'{name}/merged' in golden:
        # hidden from the output by out_norm, hence measured by itself: the merge is a sum
        got = merged[0] if given['channel_first'] else merged[0].permute(0, 3, 1, 2)
        expected = torch.from_numpy(golden[f'{name}/merged'])
        torch.testing.assert_close(got.flatten(2), expected, rtol=rtol,
                                   atol=2e-5 * float(expected.abs().max().clamp(min=1)))


def test_both_layouts_are_one_function():
    arch = dict(dim=16, depths=(1, 1, 1, 1))
    first = VMamba(dict(arch, channel_first=True)).eval()
    last = VMamba(dict(arch, channel_first=False)).eval()
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        for a, b in zip(first(x), last(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('form', ['dense', 'cls'])
@pytest.mark.parametrize('arch', [a for a in ARCHITECTURES if '_' in a])
def test_names_and_shapes(arch, form):
    expected = KEYS[f'vmamba_{arch}_{form}']
    with torch.device('meta'):
        model = VMamba(arch) if form == 'dense' else VMambaClassifier(arch)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected['keys']
    assert sum(p.numel() for p in model.parameters()) == expected['num_params']


def test_short_names_are_the_models_of_the_paper():
    for name, full in (('tiny', 'tiny_s1l8'), ('small', 'small_s2l15'), ('base', 'base_s2l15')):
        assert ARCHITECTURES[name] is ARCHITECTURES[full]


def test_first_names_and_convolution_shapes_load():
    model = VMamba(dict(ARCHITECTURES['v0_tiny'], dim=16, depths=(1, 1, 1, 1)))
    fill_state_dict(model)
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace('patch_embed.0', 'patch_embed.proj')
        name = name.replace('patch_embed.2', 'patch_embed.norm')
        name = name.replace('.norm.', '.ln_1.') if '.blocks.' in name else name
        name = name.replace('.op.', '.self_attention.')
        is_linear = name.endswith(('in_proj.weight', 'out_proj.weight'))
        old['backbone.' + name] = tensor[..., None, None].clone() if is_linear else tensor.clone()
    holder = torch.nn.Module()
    holder.backbone = VMamba(dict(ARCHITECTURES['v0_tiny'], dim=16, depths=(1, 1, 1, 1)))
    result = holder.load_state_dict(old, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(holder.backbone.state_dict()[name], tensor), name


def test_classification_file_starts_a_detector(tmp_path):
    arch = dict(dim=16, depths=(1, 1, 1, 1))
    source = VMambaClassifier(arch, num_classes=5)
    torch.save({'model': source.state_dict(), 'max_accuray_ema': 0.5}, tmp_path / 'vssm.pth')
    model = VMamba(arch, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vssm.pth')))
    model.init_weights()
    for name, tensor in source.state_dict().items():
        if not name.startswith('classifier'):
            assert torch.equal(model.state_dict()[name], tensor), name


def test_scan_starts_as_in_mamba():
    torch.manual_seed(0)
    mixer = SS2D(64, state_dim=3)
    step = torch.nn.functional.softplus(mixer.dt_projs_bias)
    assert 9e-4 < step.min() < 3e-3 and 3e-2 < step.max() < 1.01e-1
    decay = torch.tensor([1., 2., 3.]).expand(4 * 128, 3)
    torch.testing.assert_close(mixer.A_logs.exp(), decay)
    assert torch.equal(mixer.Ds, torch.ones(4 * 128))


# --- the published configs' spelling -----------------------------------------------------------

TINY = dict(dims=96, depths=(2, 2, 8, 2), ssm_d_state=1, ssm_dt_rank='auto', ssm_ratio=1.0,
            ssm_conv=3, ssm_conv_bias=False, forward_type='v05_noz', mlp_ratio=4.0,
            downsample_version='v3', patchembed_version='v2', drop_path_rate=0.2,
            norm_layer='ln2d', patch_norm=True, out_indices=(0, 1, 2, 3), pretrained='')
V0_TINY = dict(dims=96, depths=(2, 2, 9, 2), ssm_d_state=16, ssm_dt_rank='auto', ssm_ratio=2.0,
               mlp_ratio=0.0, downsample_version='v1', patchembed_version='v1', patch_norm=True,
               drop_path_rate=0.2, out_indices=(0, 1, 2, 3), pretrained='')
FROM_SWIN = dict(embed_dims=96, num_heads=[3, 6, 12, 24], window_size=7, qkv_bias=True,
                 qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0)
FROM_DETECTION = dict(with_cp=False, convert_weights=True, init_cfg=None)
FROM_SEGMENTATION = dict(pretrain_img_size=224, patch_size=4, strides=(4, 2, 2, 2),
                         use_abs_pos_embed=False, act_cfg=dict(type='GELU'),
                         norm_cfg=dict(type='LN'))


@pytest.mark.parametrize(('settings', 'inherited', 'variant'), [
    (TINY, FROM_SWIN | FROM_DETECTION, 'tiny_s1l8'),
    (TINY, FROM_SWIN | FROM_SEGMENTATION, 'tiny_s1l8'),
    (V0_TINY, FROM_SWIN | FROM_DETECTION, 'v0_tiny')], ids=['det', 'seg', 'v0-det'])
def test_published_settings_build(settings, inherited, variant):
    with torch.device('meta'), pytest.warns(UserWarning, match='have no effect') as caught:
        model = MODELS.build(dict(type='MM_VSSM', **settings, **inherited))
    ours = [w for w in caught if 'MM_VSSM' in str(w.message)]
    assert len(ours) == 1
    assert all(f'{name}=' in str(ours[0].message) for name in inherited)
    expected = KEYS[f'vmamba_{variant}_dense']['keys']
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected
    rates = [getattr(b.drop_path, 'rate', 0) for stage in model.layers for b in stage.blocks]
    assert max(rates) == 0.2


def test_published_settings_give_the_same_function():
    shrunk = dict(dims=16, depths=(1, 1, 1, 1))
    x = torch.randn(1, 3, 70, 45)
    for settings, arch in ((TINY, 'tiny'), (V0_TINY, 'v0_tiny')):
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # nothing is ignored here
            dropin = MM_VSSM(**settings | shrunk).eval()
        ours = VMamba(dict(ARCHITECTURES[arch], dim=16, depths=(1, 1, 1, 1))).eval()
        ours.load_state_dict(dropin.state_dict())
        with torch.no_grad():
            for a, b in zip(dropin(x), ours(x), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize('key', [name for name in KEYS if name.endswith('_dense')])
def test_all_arguments_of_a_published_network_are_taken(key):
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('error')  # nothing is ignored
        model = MM_VSSM(**KEYS[key]['config'])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == KEYS[key]['keys']


def test_pretrained_is_loaded_by_init_weights_only():
    model = MM_VSSM(**TINY | dict(dims=16, depths=(1, 1, 1, 1), pretrained='nowhere.pth'))
    assert model.init_cfg == dict(type='Pretrained', checkpoint='nowhere.pth')
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        model.init_weights()


@pytest.mark.parametrize(('change', 'message'), [
    (dict(forward_type='v05_oact_noz'), "forward_type='v05_oact_noz'.*v05.*_noz"),
    (dict(forward_type='v052d'), 'other forms have no released weights'),
    (dict(norm_layer='bn'), "norm_layer='bn'"),
    (dict(dims=[96, 96, 96, 96]), 'four that double'),
    (dict(ssm_conv=5), 'ssm_conv=5'),
    (dict(ssm_act_layer='gelu'), "ssm_act_layer='gelu', expected 'silu': no released model"),
    (dict(ssm_init='v1'), "ssm_init='v1', expected 'v0': no released model"),
    (dict(mlp_act_layer='silu'), "mlp_act_layer='silu', expected 'gelu': no released model"),
    (dict(ssm_act_layer=None), 'ssm_act_layer=None, expected'),
    (dict(downsample_version='v9'), "'v9', expected one of v1, v2, v3"),
])
def test_published_settings_without_a_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MM_VSSM(**TINY | change)


@pytest.mark.parametrize(('arch', 'error', 'message'), [
    ('tinny', ValueError, "arch='tinny'; did you mean 'tiny'"),
    (dict(dim=96), ValueError, 'lacks depths'),
    (dict(dim=96, depths=(2, 2, 2)), ValueError, 'got 3 values'),
    (dict(dim=96, depths=(2, 2, 2, 2), mlp_ratio=-1), ValueError, 'expected a positive number'),
    (dict(dim=96, depths=(2, 2, 2, 2), stem='v3'), ValueError, "'v3', expected one of v1, v2"),
    (dict(dim=96, depths=(2, 2, 2, 2), gated=True), TypeError, "'gated'; did you mean 'gate'"),
    (dict(dim=96, depths=(2, 2, 2, 2), gate=1), TypeError, "arch['gate']=1, expected True or"),
])
def test_wrong_architectures(arch, error, message):
    with pytest.raises(error) as caught:
        VMamba(arch)
    assert message in str(caught.value)
