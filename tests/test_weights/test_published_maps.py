"""A classification file as published, into the dense backbone, to the published maps."""
import json

import numpy as np
import pytest
import torch
from fill import fill_state_dict, fill_value, make_input
from released_files import DATA, NESTINGS, key_lists

from mmhybrid.models import (
    LocalVim,
    LocalVimClassifier,
    LocalVMamba,
    MambaVision,
    Vim,
    VimClassifier,
    VMamba,
    VMambaClassifier,
)
from mmhybrid.models.backbones.mambavision import ARCHITECTURES
from mmhybrid.models.checkpoints import load_backbone


def cases(family):
    return {case['name']: case
            for case in json.loads((DATA / family / 'manifest.json').read_text())['cases']} \
        if family != 'mambavision' else json.loads(
            (DATA / family / 'manifest.json').read_text())['cases']


def written(keys, path, nesting, computed=None):
    """Write a file of the published names and shapes, filled by the rules of the goldens."""
    state = {name: torch.zeros(shape, dtype=torch.int64 if name.endswith('num_batches_tracked')
                               else torch.float32) for name, shape in key_lists()[keys].items()}
    fill_state_dict(state)
    # rotary tables are computed, not filled
    state.update({n: t for n, t in (computed or {}).items() if n.startswith('rope.')})
    torch.save(NESTINGS[nesting](state), path)
    return path


def filled_gaps(net, report):
    """Fill what the file did not have."""
    own = net.state_dict()
    fill_state_dict({name: own[name] for name in report.comparison.fresh})
    return net.eval()


def assert_maps(net, image, stored, noise, prefix='out'):
    with torch.no_grad():
        maps = net(image)
    for i, out in enumerate(maps):
        error = float((out - torch.from_numpy(stored[f'{prefix}{i}'])).abs().max())
        assert error <= 10 * noise[i], f'map {i}: off by {error:.2e}, noise is {noise[i]:.2e}'


def assert_complete(report, keys, dense):
    """Everything that both forms have is loaded, and nothing else."""
    theirs, ours = key_lists()[keys], key_lists()[dense]
    result = report.comparison
    assert set(result.matched) == set(theirs) & set(ours)
    assert set(result.fresh) == set(ours) - set(theirs)
    assert set(result.unused) == set(theirs) - set(ours)
    assert not result.missing and not result.unexpected and not result.disagreeing


@pytest.mark.parametrize(('name', 'arch', 'key'), [
    ('T_w16_8_96x160', 'tiny', 'T'), ('S_128x96', 'small', 'S')])
def test_mambavision(name, arch, key, tmp_path):
    case = cases('mambavision')[name]
    facts = json.loads((DATA / 'mambavision' / 'keys' / f'{key}.json').read_text())
    keys = f'mambavision_{key}_classification'
    assert case['dt_bias'] == -4.0  # the value of the fill rules
    net = MambaVision(arch, window_size=case['backbone']['window_size'])
    report = load_backbone(net, written(keys, tmp_path / 'w.pth.tar', 'timm'))
    assert_complete(report, keys, f'mambavision_{key}_dense')
    assert report.comparison.fresh == facts['dense_missing_when_loading_classification']
    assert report.comparison.unused == facts['dense_unexpected_when_loading_classification']
    assert f"MambaVision arch='{arch}', classification (in 'state_dict')" in str(report)
    assert ARCHITECTURES[arch]['dim'] == facts['dims'][0]
    stored = np.load(DATA / 'mambavision' / case['file'])
    assert_maps(filled_gaps(net, report), make_input(case['input']['seed'], case['input']['shape']),
                stored, [noise['max_abs_f32_vs_f64'] for noise in case['noise']])


@pytest.mark.parametrize(('name', 'arch', 'key'), [
    ('vmamba_t_128x96', 'tiny', 'tiny_s1l8'), ('vmamba_v0_t_60x76', 'v0_tiny', 'v0_tiny')])
def test_vmamba(name, arch, key, tmp_path):
    case = cases('vmamba')[name]
    net = VMamba(arch)
    report = load_backbone(net, written(f'vmamba_{key}_cls', tmp_path / 'w.pth', 'deit'))
    assert_complete(report, f'vmamba_{key}_cls', f'vmamba_{key}_dense')
    assert_maps(filled_gaps(net, report), make_input(case['input']['seed'], case['input']['shape']),
                np.load(DATA / 'vmamba' / f'{name}.npz'),
                case.get('f32_vs_f64_maxabs', [7.5e-6] * 4))


def test_localvmamba(tmp_path):
    case = cases('localmamba')['localvmamba_t_64x64']
    net = LocalVMamba('tiny')
    report = load_backbone(net, written('local_vssm_tiny_cls', tmp_path / 'w.ckpt', 'state_dict'))
    assert_complete(report, 'local_vssm_tiny_cls', 'local_vssm_tiny_dense')
    assert_maps(filled_gaps(net, report), make_input(case['input']['seed'], case['input']['shape']),
                np.load(DATA / 'localmamba' / 'localvmamba_t_64x64.npz'),
                case['f32_vs_f64_maxabs'])


def test_localvim(tmp_path):
    case = cases('localmamba')['localvim_t_112x112']
    net = LocalVim('tiny')
    path = written('local_vim_tiny_cls', tmp_path / 'w.ckpt', 'state_dict', net.state_dict())
    report = load_backbone(net, path)
    fresh = {name.split('.')[-1] if name.startswith('layers') else name.split('.')[0]
             for name in report.comparison.fresh}
    assert fresh == {'bias', 'outnorm_0', 'outnorm_1', 'outnorm_2', 'outnorm_3'}
    assert len(report.comparison.fresh) == 20 + 8  # LayerNorms in place of RMSNorms have biases
    assert set(report.comparison.unused) == {'norm_f.weight', 'head.weight', 'head.bias'}
    assert not report.comparison.missing and not report.comparison.unexpected
    assert_maps(filled_gaps(net, report), make_input(case['input']['seed'], case['input']['shape']),
                np.load(DATA / 'localmamba' / 'localvim_t_112x112.npz'), case['f32_vs_f64_maxabs'])


@pytest.mark.parametrize(('row', 'key'), [
    ('first', 'official_drop_index0'), ('middle', 'midtoken_aware_drop_index98')])
def test_vim_positions(row, key, tmp_path):
    net = Vim('tiny', img_size=128, dropped_row=row)
    report = load_backbone(net, written('cls_vim_t', tmp_path / 'w.pth', 'deit'))
    assert {name.split('.')[0] for name in report.comparison.fresh} == {'fpn1', 'fpn2'}
    assert set(report.comparison.unused) == {'head.weight', 'head.bias'}
    assert not report.comparison.missing and not report.comparison.unexpected
    assert report.resized == {'pos_embed': ((1, 197, 192), (1, 64, 192))}
    golden = np.load(DATA / 'vim' / 'loader_pos_embed_197_to_8x8.npz')[key]
    torch.testing.assert_close(net.pos_embed.detach(), torch.from_numpy(golden))
    layer = net.state_dict()['layers.3.mixer.A_b_log']
    torch.testing.assert_close(layer, torch.from_numpy(
        fill_value('layers.3.mixer.A_b_log', tuple(layer.shape))).float())


@pytest.mark.parametrize(('keys', 'name', 'field', 'build'), [
    ('cls_vim_t', 'cls_vim_t_224', 'logits50', lambda: VimClassifier('tiny')),
    ('vmamba_tiny_s1l8_cls', 'vmamba_t_cls_64x64', 'logits', lambda: VMambaClassifier('tiny')),
    ('local_vim_tiny_cls', 'localvim_t_cls_224', 'logits', lambda: LocalVimClassifier('tiny'))])
def test_classifiers(keys, name, field, build, tmp_path):
    family = dict(cls='vim', vmamba='vmamba', local='localmamba')[keys.split('_')[0]]
    case, net = cases(family)[name], build()
    report = load_backbone(net, written(keys, tmp_path / 'w.pth', 'deit', net.state_dict()))
    result = report.comparison
    assert set(result.matched) == set(key_lists()[keys]) and not result.fresh
    assert result.share == 1 and not result.unused
    shape = case.get('input_shape') or case['input']['shape']
    with torch.no_grad():
        logits = net.eval()(make_input(case.get('input_seed', case.get('input', {}).get('seed')),
                                       shape))
    stored = np.load(DATA / family / f'{name}.npz')[field]
    error = float((logits[:, :stored.shape[1]] - torch.from_numpy(stored)).abs().max())
    assert error <= 1e-4, f'off by {error:.2e}'
