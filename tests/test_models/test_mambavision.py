"""MambaVision: parity with stored outputs of the published code, and every argument."""
import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_state_dict, make_input
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from mmhybrid.layers import (
    Attention,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    MambaVisionMixer,
    near_equal,
    window_partition,
    window_unpartition,
)
from mmhybrid.models import MambaVision, MambaVisionClassifier, MM_mamba_vision
from mmhybrid.models.backbones.mambavision import (
    ARCHITECTURES,
    ConvStage,
    HybridBlock,
    HybridStage,
)

GOLDEN = Path(__file__).parents[1] / 'data/mambavision'
CASES = json.loads((GOLDEN / 'manifest.json').read_text())['cases']
ARCH_OF = {
    'T': 'tiny', 'T2': 'tiny2', 'S': 'small', 'B': 'base', 'B_21k': 'base', 'L': 'large',
    'L_21k': 'large', 'L2': 'large2', 'L2_512_21k': 'large2', 'L3_256_21k': 'large3',
    'L3_512_21k': 'large3'
}
TOY = dict(dim=8, stem_width=4, depths=(1, 2, 3, 2), num_heads=(1, 1, 2, 4),
           window_size=(8, 8, 4, 3), layer_scale=1e-5)


def toy(**arguments):
    torch.manual_seed(0)
    return MambaVision(TOY, **arguments)


def assert_close(out, stored, noise):
    """Ten times the difference between float32 and float64 of the published code."""
    worst = np.abs(out.detach().numpy() - stored).max()
    assert worst <= 10 * noise['max_abs_f32_vs_f64'], f'off by {worst}'


# ------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize('name', [n for n, c in CASES.items() if c['kind'] == 'dense backbone'])
def test_dense_golden(name):
    case, stored = CASES[name], np.load(GOLDEN / CASES[name]['file'])
    net = MambaVision(ARCH_OF[case['variant']], window_size=case['backbone']['window_size']).eval()
    fill_state_dict(net, dt_bias=case['dt_bias'])
    with torch.no_grad():
        maps = net(make_input(case['input']['seed'], case['input']['shape']))
    assert len(maps) == 4
    for i, out in enumerate(maps):
        assert_close(out, stored[f'out{i}'], case['noise'][i])


@pytest.mark.parametrize('name', ['grad_T_64x64', 'grad_T_64x64_dtm1'])
def test_gradient_golden(name):
    case = json.loads((GOLDEN / f'{name}.json').read_text())
    net = MambaVision('tiny', window_size=case['window_size']).eval()
    fill_state_dict(net, dt_bias=case['dt_bias'])
    image = make_input(case['input']['seed'], case['input']['shape']).requires_grad_()
    rng = np.random.RandomState(7)
    loss = sum((out * torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32))).sum()
               for out in net(image))
    loss.backward()
    assert abs(loss.item() - case['loss_value_f64']) < 10 * abs(
        case['loss_value_f32'] - case['loss_value_f64']) + 1e-3
    stored = np.load(GOLDEN / f'{name}_input.npz')['grad_input']
    assert_close(image.grad, stored, CASES[f'{name}_input']['noise'][0])
    assert set(case['grads_f64']) == {key for key, _ in net.named_parameters()}
    for key, parameter in net.named_parameters():
        grad, (norm, dot) = parameter.grad.double().numpy(), case['grads_f64'][key]
        direction = np.random.RandomState(zlib.crc32(f'grad:{key}'.encode())).standard_normal(
            grad.shape)
        assert abs(np.linalg.norm(grad) - norm) <= 10 * norm * case[
            'worst_relative_norm_error_f32_vs_f64'], key
        assert abs((grad * direction).sum() - dot) <= 10 * norm * case[
            'worst_dot_error_over_norm_f32_vs_f64'], key


@pytest.mark.parametrize('name', ['unit_stage_conv_d16', 'unit_stage_d32_w5'])
def test_stage_golden(name):
    case, stored = CASES[name], np.load(GOLDEN / CASES[name]['file'])
    config = case['config']
    rates = [0.] * config['depth']
    if config['conv']:
        stage = ConvStage(config['dim'], rates)
    else:
        stage = HybridStage(config['dim'], config['num_heads'], config['window_size'], rates)
    fill_state_dict(stage.eval(), dt_bias=case['dt_bias'])
    assert [[k, list(v.shape)] for k, v in stage.state_dict().items()] == case['keys']
    with torch.no_grad():
        before = stage(torch.from_numpy(stored['in0']))
        after = stage.downsample(before)
    assert_close(after, stored['out0'], case['noise'][0])
    assert_close(before, stored['out1'], case['noise'][1])


@pytest.mark.parametrize('name, mixer, layer_scale', [
    ('unit_block_mixer_d64', lambda: MambaVisionMixer(64), None),
    ('unit_block_attention_d64_ls', lambda: Attention(64, 4), 1e-5),
])
def test_block_golden(name, mixer, layer_scale):
    case, stored = CASES[name], np.load(GOLDEN / CASES[name]['file'])
    block = fill_state_dict(HybridBlock(64, mixer(), layer_scale=layer_scale).eval(),
                            dt_bias=case['dt_bias'])
    assert [[k, list(v.shape)] for k, v in block.state_dict().items()] == case['keys']
    with torch.no_grad():
        assert_close(block(torch.from_numpy(stored['in0'])), stored['out0'], case['noise'][0])


@pytest.mark.parametrize('layer_scale', [None, 0.5])
@pytest.mark.parametrize('drop_path', [0., 0.5])
def test_block_together_with_the_norm_behind_it(layer_scale, drop_path):
    """The same bits and gradients as one after the other, also for kept tokens."""
    block = HybridBlock(16, Attention(16, 2), layer_scale=layer_scale, drop_path=drop_path)
    norm, x = LayerNorm(16), torch.randn(6, 9, 16, requires_grad=True)
    leaves = [x, *block.parameters(), *norm.parameters()]
    for kept in (None, lambda t: t[:, 2:5]):
        results = []
        for together in (False, True):
            torch.manual_seed(0)
            if together:
                y, normed = block(x, kept, block.norm1(x), norm)
            else:
                y = block(x, kept)
                normed = norm(y)
            grads = torch.autograd.grad((y * normed).sum(), leaves)
            results.append([y, normed, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize('size', [(64, 64), (48, 80)])  # windows that fit, and padded ones
def test_hooks_see_every_block(size):
    net, seen = toy(), set()
    blocks = [block for stage in net.stages for block in stage.blocks]
    for block in blocks:
        block.register_forward_hook(lambda module, *_: seen.add(module))
    net(torch.randn(1, 3, *size))
    assert seen == set(blocks)


@pytest.mark.parametrize('variant', ARCH_OF)
def test_names_shapes_and_counts_of_published_variants(variant):
    facts = json.loads((GOLDEN / f'keys/{variant}.json').read_text())
    published = [(k, tuple(shape), dtype) for k, shape, dtype in facts['classification']]
    with torch.device('meta'):
        dense = MambaVision(ARCH_OF[variant])
        classifier = MambaVisionClassifier(ARCH_OF[variant])

    def listed(net):
        return [(k, tuple(v.shape), str(v.dtype).removeprefix('torch.'))
                for k, v in net.state_dict().items()]

    assert listed(classifier) == published
    assert sum(p.numel() for p in classifier.parameters()) == facts['params']
    missing = {k for k, *_ in listed(dense)} - {k for k, *_ in published}
    unexpected = {k for k, *_ in published} - {k for k, *_ in listed(dense)}
    assert missing == {f'outnorm{i}.{p}' for i in range(4) for p in ('weight', 'bias')}
    assert unexpected == {f'norm.{p}' for p in ('weight', 'bias', 'running_mean', 'running_var',
                                                'num_batches_tracked')} | {'head.weight',
                                                                           'head.bias'}
    assert [key for key in listed(dense) if not key[0].startswith('outnorm')] == [
        key for key in published if key[0] not in unexpected]

    kinds = {MambaVisionMixer: 'mamba', Attention: 'attn'}
    for i in (2, 3):
        stage = dense.levels[i]
        assert [kinds[type(b.mixer)] for b in stage.blocks] == facts['mixer_kind'][i]
        assert {b.mixer.dt_rank for b in stage.blocks if hasattr(b.mixer, 'dt_rank')} == {
            facts['dt_rank'][i]}
        assert {b.mixer.num_heads for b in stage.blocks if hasattr(b.mixer, 'num_heads')} == {
            facts['num_heads'][i]}
    rates = [[getattr(b.drop_path, 'rate', 0.) for b in stage.blocks]
             for stage in classifier.levels]
    assert [[round(r, 6) for r in stage] for stage in rates] == facts['drop_path']


def test_epsilons_activations_and_biases():
    net = toy()
    eps = {n: m.eps for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n for n, e in eps.items() if e == 1e-4} == {'patch_embed.conv_down.1',
                                                        'patch_embed.conv_down.4'}
    assert {e for n, e in eps.items() if n.startswith('levels')} == {1e-5}
    assert {m.eps for m in net.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


# ----------------------------------------------------------------------------- image to maps


@pytest.mark.parametrize('size', [(511, 511), (112, 137), (64, 96), (33, 1)], ids=str)
def test_any_size(size):
    net = toy().eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, *size))
    assert isinstance(maps, tuple)
    for out, channels, stride in zip(maps, net.out_channels, net.out_strides, strict=True):
        sides = tuple(-(-side // stride) for side in size)
        assert out.shape == (1, channels, *sides) and out.is_contiguous()
        assert out.isfinite().all()
    assert net.out_channels == (8, 16, 32, 64) and net.out_strides == (4, 8, 16, 32)


def test_every_parameter_gets_a_gradient():
    net = toy(drop_path_rate=0.)
    sum(out.square().mean() * (i + 1) for i, out in enumerate(net(torch.randn(2, 3, 70, 50)))
        ).backward()
    # a norm's output has a constant mean square, hence the next assertion on existence only there
    lacking = [n for n, p in net.named_parameters() if p.grad is None]
    assert not lacking
    fill_state_dict(net, dt_bias=-1.)
    net.zero_grad()
    sum((out * torch.randn(out.shape)).sum() for out in net(torch.randn(2, 3, 70, 50))).backward()
    # a convolution's bias right before BatchNorm cancels
    lacking = [n for n, p in net.named_parameters()
               if not p.grad.abs().sum() > 0 and not n.endswith(('conv1.bias', 'conv2.bias'))]
    assert not lacking


def test_windows_are_independent_and_padding_counts():
    net = toy(out_indices=(2,)).eval()
    fill_state_dict(net, dt_bias=-1.)
    stage = net.levels[2]
    x = torch.randn(1, 32, 4, 8)
    with torch.no_grad():
        both = stage(x)
        assert torch.allclose(both[..., 4:], stage(x[..., 4:]), atol=1e-5)
        narrow = stage(x[..., :3])
    assert not torch.allclose(narrow, both[..., :3], atol=1e-2)


@pytest.mark.parametrize('out_indices', [(3,), (0, 2), (1, 2, 3)], ids=str)
def test_requested_stages_only(out_indices):
    full, some = toy().eval(), toy(out_indices=out_indices).eval()
    fill_state_dict(full)
    fill_state_dict(some)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = [full(x)[i] for i in out_indices]
        for a, b in zip(some(x), wanted, strict=True):
            assert torch.equal(a, b)
    assert some.out_channels == tuple(8 * 2 ** i for i in out_indices)
    assert some.out_strides == tuple(4 * 2 ** i for i in out_indices)
    norms = {n for n, _ in some.named_children() if n.startswith('outnorm')}
    assert norms == {f'outnorm{i}' for i in out_indices}
    # what no output depends on must not wait for gradients in distributed training
    sum(out.sum() for out in some.train()(x)).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in some.parameters())


def test_autocast_stays_close_and_trains():
    net = fill_state_dict(toy(drop_path_rate=0.), dt_bias=-1.)
    x = torch.randn(2, 3, 64, 64)
    exact = net(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps = net(x)
        loss = sum(out.float().square().mean() for out in maps)
    loss.backward()
    for a, b in zip(maps, exact, strict=True):
        assert (a.float() - b).abs().mean() < 0.05
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


# ------------------------------------------------------------------------------- windows


def tight(window_size, **arguments):
    return fill_state_dict(toy(windows='tight', window_size=window_size, **arguments), dt_bias=-1.)


def test_tight_windows_that_hold_the_map_are_one_result():
    """Of a 7 x 11 map in stage 3 and a 4 x 6 map in stage 4."""
    x = torch.randn(2, 3, 97, 161)
    with torch.no_grad():
        expected = tight((8, 8, 11, 6)).eval()(x)
        for windows in ((8, 8, 14, 7), (8, 8, 112, 56), (8, 8, 160, 80)):
            for a, b in zip(tight(windows).eval()(x), expected, strict=True):
                assert torch.equal(a, b)


def test_tight_windows_are_published_windows_where_nothing_is_padded():
    x = torch.randn(2, 3, 96, 64)  # 6 x 4 and 3 x 2
    published = fill_state_dict(toy(window_size=(8, 8, 2, 1)), dt_bias=-1.).eval()
    with torch.no_grad():
        for a, b in zip(tight((8, 8, 2, 1)).eval()(x), published(x), strict=True):
            assert_near(a, b)


@pytest.mark.parametrize('window', [1, 3, 4, 5, 7, 16])
def test_tight_stage_runs_each_window_by_itself(window):
    """Against the blocks on one window at a time, cut by hand."""
    H, W = 7, 11
    stage = fill_state_dict(HybridStage(32, 4, window, [0.] * 3, tight=True).eval(), dt_bias=-1.)
    x = torch.randn(2, 32, H, W)
    out = torch.full_like(x, torch.nan)
    with torch.no_grad():
        for rows in np.array_split(range(H), -(-H // window)):
            for columns in np.array_split(range(W), -(-W // window)):
                box = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
                tokens = x[box].flatten(2).transpose(1, 2)
                assert max(len(rows), len(columns)) <= window
                for block in stage.blocks:
                    tokens = block(tokens)
                out[box] = tokens.transpose(1, 2).unflatten(2, (len(rows), len(columns)))
        assert_near(stage(x), out)


@pytest.mark.parametrize('size', [(8, 8), (7, 11), (3, 3), (8, 3), (9, 4), (1, 13)])
@pytest.mark.parametrize('with_cp', [False, True])
def test_padded_queries_of_the_last_attention_are_not_computed(size, with_cp, monkeypatch):
    """Outputs and gradients are those of a stage that computes them and throws them away."""
    stage = HybridStage(32, 4, 4, [0.] * 4, downsample=False, with_cp=with_cp)
    fill_state_dict(stage, dt_bias=-1.)
    x = torch.randn(2, 32, *size, requires_grad=True)
    tokens = window_partition(x, 4)
    for block in stage.blocks:
        tokens = block(tokens)
    expected = window_unpartition(tokens, 4, size)
    cotangent = torch.randn_like(expected)
    leaves = dict(stage.named_parameters(), x=x)
    wanted = torch.autograd.grad(expected, leaves.values(), cotangent)

    queries = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, 'scaled_dot_product_attention',
        lambda q, k, v: queries.append((q.shape[0] * q.shape[2], k.shape[2])) or real(q, k, v))
    out = stage(x)
    monkeypatch.undo()
    padded, whole = tokens.shape[0] * 16, 2 * size[0] * size[1]
    assert queries[0] == (padded, 16)
    assert sum(number for number, _ in queries[1:]) == whole
    assert {keys for _, keys in queries} == {16}
    assert_near(out, expected)
    for name, a, b in zip(leaves, torch.autograd.grad(out, leaves.values(), cotangent), wanted,
                          strict=True):
        assert_near(a, b, name)


def test_tight_windows_train():
    net = tight((8, 8, 4, 3), drop_path_rate=0.5, with_cp=True)
    sum(out.square().mean() for out in net(torch.randn(2, 3, 97, 161))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('windows', ['published', 'tight'])
@pytest.mark.parametrize('with_cp', [False, True])
def test_one_draw_decides_what_is_dropped(monkeypatch, windows, with_cp):
    """Of images, and of the windows of a 6 x 9 map in stage 3 and a 3 x 5 map in stage 4."""
    net = toy(windows=windows, window_size=(8, 8, 5, 3), drop_path_rate=0.5, with_cp=with_cp)
    draws, real = [], torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, 'uniform_', lambda x: draws.append(len(x)) or real(x))
    monkeypatch.setattr(torch.Tensor, 'bernoulli_', lambda x, p: pytest.fail('drawn apart'))
    x = torch.randn(2, 3, 93, 137)
    sum(y.sum() for y in net(x)).backward()
    # two convolutional blocks, three blocks of two branches on four windows, two on two
    assert draws == [2 * (2 + 3 * 2 * 4 + 2 * 2 * 2)]
    net.eval()(x)
    assert len(draws) == 1


@pytest.mark.parametrize('windows', ['published', 'tight'])
def test_a_stage_whose_branches_are_all_dropped_changes_nothing(monkeypatch, windows):
    net = toy(windows=windows, window_size=(8, 8, 5, 3), drop_path_rate=0.5)
    stage, x = net.levels[2], torch.randn(2, 32, 7, 11)
    assert not torch.equal(stage(x), x)
    monkeypatch.setattr(torch, '_foreach_floor_', torch._foreach_zero_)
    assert torch.equal(stage(x), x)


@pytest.mark.parametrize('side, window, expected', [
    (7, 14, [(1, 7)]), (14, 7, [(2, 7)]), (50, 14, [(2, 13), (2, 12)]), (5, 4, [(1, 3), (1, 2)]),
    (1, 1, [(1, 1)]), (9, 1, [(9, 1)]), (25, 56, [(1, 25)]),
])
def test_near_equal(side, window, expected):
    assert near_equal(side, window) == expected


def assert_near(a, b, name=''):
    scale = b.abs().max().item()
    assert (a - b).abs().max().item() <= 2e-5 * max(scale, 1e-3), name


# ------------------------------------------------------------------------------- arguments


def rates(net):
    return [getattr(block.drop_path, 'rate', 0.) for stage in net.levels for block in stage.blocks]


def test_drop_path_rate_reaches_every_block():
    assert rates(toy(drop_path_rate=0.7)) == pytest.approx([0.1 * i for i in range(8)])
    assert rates(toy()) == pytest.approx([0.2 * i / 7 for i in range(8)])
    assert not any(isinstance(m, DropPath) for m in toy(drop_path_rate=0.).modules())


def test_layer_scale():
    def gammas(net):
        return {n.rsplit('.', 1)[-1]: p.unique().tolist() for n, p in net.named_parameters()
                if 'gamma' in n}

    assert gammas(toy()) == dict(gamma_1=[pytest.approx(1e-5)], gamma_2=[pytest.approx(1e-5)])
    assert gammas(toy(layer_scale=None)) == {}
    assert gammas(toy(layer_scale=0.5)) == dict(gamma_1=[0.5], gamma_2=[0.5])


def test_window_size_in_channels_and_norm_choices():
    assert [s.window for s in toy(window_size=(8, 8, 6, 5)).levels[2:]] == [6, 5]
    assert toy(in_channels=5)(torch.randn(1, 5, 32, 32))[0].shape[1] == 8
    assert isinstance(toy().outnorm0, LayerNorm2d)
    assert isinstance(toy(out_norm='bn').outnorm3, nn.BatchNorm2d)
    assert not [k for k in toy(out_norm=None).state_dict() if k.startswith('outnorm')]


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    net = toy(frozen_stages=frozen_stages)
    frozen = (['patch_embed.'] if frozen_stages >= 0 else []) + [
        f'levels.{i}.' for i in range(max(frozen_stages, 0))]
    for _ in range(2):
        for name, parameter in net.named_parameters():
            assert parameter.requires_grad != name.startswith(tuple(frozen)), name
        for name, module in net.named_modules():
            if name and not any(True for _ in module.children()):
                assert module.training != f'{name}.'.startswith(tuple(frozen)), name
        net.eval()
        net.train()
    before = {k: v.clone() for k, v in net.state_dict().items() if 'running' in k}
    sum(out.sum() for out in net(torch.randn(1, 3, 64, 64))).backward()
    for name, value in before.items():
        assert torch.equal(value, net.state_dict()[name]) == name.startswith(tuple(frozen)), name


def test_norm_eval_keeps_running_statistics():
    net = toy(norm_eval=True, out_norm='bn').train()
    before = {k: v.clone() for k, v in net.state_dict().items() if 'running' in k}
    net(torch.randn(1, 3, 64, 64))
    assert before and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert net.levels[2].blocks[0].training
    assert toy(norm_eval=False).levels[0].blocks[0].norm1.training


def test_checkpointing_gives_equal_maps_gradients_and_statistics():
    def run(with_cp):
        net = fill_state_dict(toy(with_cp=with_cp, drop_path_rate=0.5), dt_bias=-1.)
        torch.manual_seed(1)
        maps = net(torch.randn(3, 3, 48, 48))
        sum(out.square().sum() for out in maps).backward()
        return [*maps, *net.state_dict().values(), *(p.grad for p in net.parameters())]

    for plain, again in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, again)


def test_checkpointing_runs_blocks_again(monkeypatch):
    calls = []
    forward = HybridBlock.forward
    monkeypatch.setattr(HybridBlock, 'forward',
                        lambda self, *inputs: calls.append(1) or forward(self, *inputs))
    for with_cp, expected in ((False, 5), (True, 10)):
        calls.clear()
        sum(out.sum() for out in toy(with_cp=with_cp)(torch.randn(1, 3, 32, 32))).backward()
        assert len(calls) == expected
    calls.clear()
    toy(with_cp=True, frozen_stages=4)(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert len(calls) == 5  # nothing to differentiate, nothing to recompute


@pytest.mark.parametrize('arguments, kind, message', [
    (dict(arch='tyni'), ValueError, "arch='tyni'; did you mean 'tiny'"),
    (dict(arch=3), TypeError, 'arch of type int'),
    (dict(arch=dict(TOY, depth=3)), TypeError, "unknown key 'depth'; did you mean 'depths'"),
    (dict(arch=dict(dim=8)), ValueError, 'lacks stem_width, depths, num_heads, window_size'),
    (dict(arch=dict(TOY, depths=(1, 2, 3))), ValueError, "3 values for arch\\['depths'\\]"),
    (dict(arch=dict(TOY, depths=(1, 2, 3, 0))), ValueError, "got 0 for arch\\['depths'\\]"),
    (dict(arch=dict(TOY, num_heads=(1, 1, 3, 4))), ValueError, 'num_heads=3 for 32 channels'),
    (dict(arch=dict(TOY, mlp_ratio=0)), ValueError, 'positive'),
    (dict(windows='tite'), ValueError, "windows='tite'; did you mean 'tight'"),
    (dict(window_size=7), TypeError, 'window_size=7, expected integers'),
    (dict(window_size=(8, 8, 14)), ValueError, 'expected 4, one per stage'),
    (dict(window_size=(8, 8, 14, 0)), ValueError, 'got 0 for window_size'),
    (dict(out_indices=()), ValueError, 'at least one stage'),
    (dict(out_indices=(2, 1)), ValueError, 'ascending'),
    (dict(out_indices=(0, 4)), ValueError, 'got 4 for out_indices, expected an integer from 0 to'),
    (dict(drop_path_rate='nonsense'), TypeError, "drop_path_rate='nonsense', expected a number"),
    (dict(drop_path_rate=1.), ValueError, 'expected 0 <= rate < 1'),
    (dict(layer_scale='on'), TypeError, "layer_scale='on'"),
    (dict(in_channels=0), ValueError, 'got 0 for in_channels'),
    (dict(frozen_stages=5), ValueError, 'got 5 for frozen_stages, expected an integer from -1 to'),
    (dict(frozen_stages=1.5), TypeError, 'frozen_stages=1.5'),
    (dict(with_cp='yes'), TypeError, "with_cp='yes', expected True or False"),
    (dict(out_norm='ln'), ValueError, "out_norm='ln'"),
    (dict(drop_path=0.1), TypeError, "did you mean 'drop_path_rate'"),
    (dict(num_classes=80), TypeError, "unknown argument 'num_classes'"),
])
def test_wrong_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        MambaVision(**{'arch': TOY, **arguments})


def test_wrong_argument_in_a_config_is_readable():
    with pytest.raises(TypeError, match="did you mean 'frozen_stages'"):
        ROOT_MODELS.build(dict(type='MambaVision', arch='tiny', frozen_stage=1))


def test_config_lists_and_dictionaries_work():
    config = Config(dict(backbone=dict(type='MambaVision', arch=dict(TOY, depths=[1, 1, 1, 1]),
                                       window_size=[8, 8, 4, 3], out_indices=[1, 3])))
    assert ROOT_MODELS.build(config.backbone).out_channels == (16, 64)


# ------------------------------------------------------------------- what mmengine relies on


def test_fresh_steps_survive_init_weights():
    net = MambaVision(dict(TOY, dim=64))
    for module in (net, nn.Sequential(net)):
        if module is net:
            net.init_weights()
        steps = torch.cat([nn.functional.softplus(2 * p.detach()) for n, p in
                           module.named_parameters() if n.endswith('dt_proj.bias')])
        assert 0.999e-3 <= steps.min() and steps.max() <= 1.001e-1
        assert steps.max() / steps.min() > 20
    linear = net.levels[2].blocks[0].mlp.fc1
    assert abs(linear.weight.std() - 0.02) < 1e-3 and not linear.bias.any()


def test_other_initialisers_still_work():
    net = MambaVision(TOY, init_cfg=dict(type='Constant', layer='LayerNorm', val=3.))
    net.init_weights()
    assert (net.levels[2].blocks[0].norm1.weight == 3).all()


def test_backbone_border():
    net = toy()
    assert not any(hasattr(m, 'num_classes') for m in net.modules())
    net.init_cfg = None  # what mmdet and mmseg do before inference
    net.init_weights()


def test_get_layer_depth_covers_every_parameter():
    net = toy()
    depths = {n: net.get_layer_depth(f'backbone.{n}', 'backbone.')
              for n, _ in net.named_parameters()}
    assert {count for _, count in depths.values()} == {10}
    assert {depth for depth, _ in depths.values()} == set(range(10))
    assert depths['patch_embed.conv_down.0.weight'][0] == 0
    assert depths['levels.0.blocks.0.conv1.weight'][0] == 1
    assert depths['levels.0.downsample.reduction.0.weight'][0] == 1
    assert depths['levels.2.blocks.0.mixer.A_log'][0] == 4
    assert depths['levels.3.blocks.1.mlp.fc2.bias'][0] == 8
    assert depths['outnorm0.weight'][0] == 9
    assert net.get_layer_depth('decode_head.conv_seg.weight', 'backbone.') == (9, 10)


# ------------------------------------------------------------------------ classification form


def test_classifier_normalises_before_pooling():
    net = fill_state_dict(MambaVisionClassifier(TOY, num_classes=5).eval())
    backbone = fill_state_dict(MambaVision(TOY, out_indices=(3,), out_norm=None).eval())
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        expected = net.head(net.norm(backbone(x)[0]).mean((2, 3)))
        assert torch.allclose(net(x), expected)
    assert expected.shape == (2, 5)
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_classifier_names_are_strict():
    with pytest.raises(TypeError, match="did you mean 'num_classes'"):
        MambaVisionClassifier(TOY, classes=5)


# ------------------------------------------------------------------------------- drop-in

OWN = dict(out_indices=(0, 1, 2, 3), pretrained=None, depths=(1, 2, 3, 2), num_heads=(1, 1, 2, 4),
           window_size=(8, 8, 4, 3), dim=8, in_dim=4, mlp_ratio=4, norm_layer='ln2d',
           layer_scale=None)
DETECTION = dict(drop_path_rate=0.5, depth=50, num_stages=4, frozen_stages=1,
                 norm_cfg=dict(type='BN'), norm_eval=True, style='pytorch',
                 init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'))
SEGMENTATION = dict(drop_path_rate=0.8, pretrain_img_size=224, embed_dims=96, patch_size=4,
                    strides=(4, 2, 2, 2), qkv_bias=True, qk_scale=None, patch_norm=True,
                    drop_rate=0., attn_drop_rate=0., use_abs_pos_embed=False,
                    act_cfg=dict(type='GELU'), norm_cfg=dict(type='LN'))


@pytest.mark.parametrize('inherited', [DETECTION, SEGMENTATION], ids=['detection', 'segmentation'])
def test_dropin_does_what_the_published_class_did(inherited):
    with pytest.warns(UserWarning, match='no effect') as caught:
        net = ROOT_MODELS.build(dict(type='MM_mamba_vision', **OWN, **inherited))
    assert len(caught) == 1
    for name in inherited:
        assert f'{name}=' in str(caught[0].message)
    assert not any(f'{name}=' in str(caught[0].message) for name in OWN)
    assert rates(net) == pytest.approx([0.2 * i / 7 for i in range(8)])
    assert all(p.requires_grad for p in net.parameters())
    assert net.train().levels[0].blocks[0].norm1.training
    assert net.init_cfg is None
    same = MambaVision(dict(TOY, layer_scale=None))
    assert list(net.state_dict()) == list(same.state_dict())


def test_dropin_without_dead_settings_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net = MM_mamba_vision(**{**OWN, 'pretrained': '/ckpts/t.pth.tar', 'norm_layer': 'bn',
                                 'layer_scale': 1e-5})
    assert net.init_cfg == dict(type='Pretrained', checkpoint='/ckpts/t.pth.tar')
    assert isinstance(net.outnorm0, nn.BatchNorm2d) and 'levels.2.blocks.0.gamma_1' in dict(
        net.named_parameters())


def test_dropin_refusals():
    with pytest.raises(ValueError, match="norm_layer='ln'.*use 'ln2d'"):
        MM_mamba_vision(**{**OWN, 'norm_layer': 'ln'})
    with pytest.raises(ValueError, match="expected 'ln2d' or 'bn'"):
        MM_mamba_vision(**{**OWN, 'norm_layer': 'LN2D'})
    with pytest.raises(TypeError, match="unknown argument 'with_cp'"):
        MM_mamba_vision(**OWN, with_cp=True)


def test_architectures_are_those_of_the_published_table():
    assert list(ARCHITECTURES) == ['tiny', 'tiny2', 'small', 'base', 'large', 'large2', 'large3']
    for variant, arch in ARCH_OF.items():
        facts = json.loads((GOLDEN / f'keys/{variant}.json').read_text())
        assert list(ARCHITECTURES[arch]['depths']) == facts['depths']
        if variant not in ('L2_512_21k', 'L3_512_21k'):
            assert list(ARCHITECTURES[arch]['window_size']) == facts['window_size']


def test_options_of_the_mixer_reach_every_mixer():
    net = toy(scan_backend='triton', fused_mixer=True, lean_mixer=True)
    mixers = [m for m in net.modules() if isinstance(m, MambaVisionMixer)]
    assert len(mixers) == 2 + 1
    assert all((m.backend, m.fused, m.lean) == ('triton', True, True) for m in mixers)
    plain = [m for m in toy().modules() if isinstance(m, MambaVisionMixer)]
    assert all((m.backend, m.fused, m.lean) == ('auto', 'auto', False) for m in plain)
    with pytest.raises(ValueError, match="fused='always', expected True, False or 'auto'"):
        toy(fused_mixer='always')
    with pytest.raises(TypeError, match='lean_mixer'):
        toy(lean_mixer='yes')
