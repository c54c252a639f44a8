"""Layers against stored outputs of the published code, and what each promises by itself."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_state_dict
from torch import nn

from mmhybrid.layers import (
    Attention,
    ConvBlock,
    ConvStem,
    DropPath,
    LayerNorm2d,
    MambaVisionMixer,
    draw_together,
    drop_path_or_identity,
    dropped,
    recomputed,
    window_partition,
    window_unpartition,
)

GOLDEN = Path(__file__).parents[1] / 'data/mambavision'
CASES = json.loads((GOLDEN / 'manifest.json').read_text())['cases']

BUILD = {
    'unit_attention_d98_h2': lambda: Attention(98, 2),
    'unit_convblock_d32': lambda: ConvBlock(32),
    'unit_layernorm2d_24': lambda: LayerNorm2d(24),
    'unit_mixer_d64': lambda: MambaVisionMixer(64),
    'unit_mixer_d64_dtm1': lambda: MambaVisionMixer(64),
    'unit_mixer_d72': lambda: MambaVisionMixer(72),
    'unit_stem_16_32': lambda: ConvStem(3, 16, 32),
}


@pytest.mark.parametrize('name', BUILD)
def test_unit_golden(name):
    case, arrays = CASES[name], np.load(GOLDEN / CASES[name]['file'])
    module = fill_state_dict(BUILD[name]().eval(), dt_bias=case['dt_bias'])
    assert [[k, list(v.shape)] for k, v in module.state_dict().items()] == case['keys']
    with torch.no_grad():
        out = module(torch.from_numpy(arrays['in0']))
    noise = case['noise'][0]['max_abs_f32_vs_f64']
    assert np.abs(out.numpy() - arrays['out0']).max() <= 10 * noise


def test_fresh_mixer_takes_steps_between_a_thousandth_and_a_tenth():
    mixer = MambaVisionMixer(4096)
    step = nn.functional.softplus(2 * mixer.dt_proj.bias.double())
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 1e-1 * 1.001
    # log-uniform: each half of the logarithmic range gets half of the channels
    assert abs((step < 1e-2).double().mean() - 0.5) < 0.05
    bound = mixer.dt_rank ** -0.5
    assert 0.98 * bound < mixer.dt_proj.weight.abs().max() <= bound
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1., 9).expand(2048, 8))
    assert torch.equal(mixer.D, torch.ones(2048))
    assert mixer.A_log._no_weight_decay and mixer.D._no_weight_decay


def test_step_has_a_floor():
    mixer = MambaVisionMixer(64)
    mixer.reset_scan_parameters(step_min=1e-9, step_max=1e-8)
    step = nn.functional.softplus(2 * mixer.dt_proj.bias.double())
    assert torch.allclose(step, torch.full_like(step, 1e-4), rtol=1e-3)


def test_step_bias_counts_twice_in_value_and_gradient():
    torch.manual_seed(0)
    mixer, x = MambaVisionMixer(16), torch.randn(2, 9, 16)
    seen = {}

    def scan(u, delta, A, B, C, **more):
        seen.update(delta=delta, **more)
        return u * (delta + more['delta_bias'][:, None])

    from mmhybrid.layers.mixers import mambavision as source
    original, source.selective_scan = source.selective_scan, scan
    try:
        mixer(x).sum().backward()
    finally:
        source.selective_scan = original
    assert torch.equal(seen['delta_bias'], 2 * mixer.dt_proj.bias)
    assert mixer.dt_proj.bias.grad.abs().sum() > 0


def test_mixer_passes_its_backend_on():
    with pytest.raises(ValueError, match='nonsense'):
        MambaVisionMixer(16, backend='nonsense')(torch.randn(1, 4, 16))
    x = torch.randn(2, 30, 16)
    mixer = MambaVisionMixer(16, backend='reference')
    expected = mixer(x)
    mixer.backend = 'torch'
    assert torch.allclose(mixer(x), expected, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*jit.trace:DeprecationWarning')
def test_mixer_can_be_traced():
    mixer, x = MambaVisionMixer(8, fused=False).eval(), torch.randn(1, 5, 8)
    traced = torch.jit.trace(mixer, x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), mixer(2 * x))


def test_mixer_keeps_scan_parameters_in_float32_under_autocast(monkeypatch):
    seen = {}

    def scan(u, delta, A, B, C, D, delta_bias, **_):
        seen.update(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
        return u

    monkeypatch.setattr('mmhybrid.layers.mixers.mambavision.selective_scan', scan)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        MambaVisionMixer(16)(torch.randn(1, 4, 16))
    assert {k: v.dtype for k, v in seen.items()} == dict(
        u=torch.bfloat16, delta=torch.bfloat16, B=torch.bfloat16, C=torch.bfloat16,
        A=torch.float32, D=torch.float32, delta_bias=torch.float32)


@pytest.mark.parametrize('size', [(6, 9), (5, 7), (1, 1), (3, 12)], ids=str)
def test_windows_come_back(size):
    x = torch.randn(2, 5, *size)
    tokens = window_partition(x, 3)
    rows, columns = -(-size[0] // 3), -(-size[1] // 3)
    assert tokens.shape == (2 * rows * columns, 9, 5) and tokens.is_contiguous()
    assert torch.equal(window_unpartition(tokens, 3, size), x)


def test_one_window_with_channels_last_is_a_view():
    x = torch.randn(2, 5, 6, 4).contiguous(memory_format=torch.channels_last)
    for window in ((6, 4), (6, 2), (3, 4), (7, 4)):
        tokens = window_partition(x, window)
        assert torch.equal(tokens, window_partition(x.contiguous(), window))
        # rows of windows follow each other in memory as well
        assert (tokens.data_ptr() == x.data_ptr()) == (window in ((6, 4), (3, 4)))
    tokens = window_partition(x, (6, 4))
    assert window_unpartition(tokens, (6, 4), (6, 4)).data_ptr() == x.data_ptr()


def test_window_order_and_padding():
    x = torch.arange(1., 7).view(1, 1, 2, 3)  # 1 2 3 / 4 5 6
    assert window_partition(x, 2).squeeze(-1).tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]
    assert window_partition(x, 4).squeeze(-1).tolist() == [
        [1, 2, 3, 0, 4, 5, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0]]


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    out = DropPath(0.25)(x)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert set(per_sample[:, 0].tolist()) == {0., torch.tensor(1 / 0.75).item()}
    assert abs(out.mean() - 1) < 0.03
    assert DropPath(0.25).eval()(x) is x
    assert isinstance(drop_path_or_identity(0.), nn.Identity)


def test_factors_drawn_together():
    torch.manual_seed(0)
    paths = [nn.Identity(), DropPath(0.25), DropPath(0.5).eval(), DropPath(0.1), DropPath(1e-6)]
    x = torch.ones(4000, 2, 3, dtype=torch.bfloat16)
    nothing, quarter, still, tenth, hardly = draw_together(paths, x)
    assert nothing is still is None
    for factors, rate in ((quarter, 0.25), (tenth, 0.1)):
        assert factors.shape == (4000,) and factors.dtype == torch.float32
        values = factors.unique()
        torch.testing.assert_close(values, torch.tensor([0., 1 / (1 - rate)]))
        assert abs(factors.mean() - 1) < 0.03
    assert hardly.min() > 0.99
    assert abs(torch.corrcoef(torch.stack([quarter, tenth]))[0, 1]) < 0.06
    y = dropped(x, quarter)
    assert y.dtype == x.dtype and torch.equal(y[:, 1, 2], quarter.to(x.dtype))
    assert dropped(x, None) is x and dropped(x, paths[0]) is x and dropped(x, paths[2]) is x
    assert draw_together([nn.Identity()], x) == [None] and draw_together([], x) == []


def test_factors_of_branches_of_unequal_sizes():
    torch.manual_seed(0)
    paths, sizes = [DropPath(0.5), nn.Identity(), DropPath(0.1), DropPath(0.25)], [6000, 3, 1, 2000]
    half, nothing, tenth, quarter = draw_together(paths, torch.ones(2, 3), sizes)
    assert nothing is None and [len(half), len(tenth), len(quarter)] == [6000, 1, 2000]
    assert half.unique().tolist() == [0., 2.] and len(quarter.unique()) == 2
    assert abs(half.mean() - 1) < 0.05 and abs(quarter.mean() - 1) < 0.05


def test_layer_norm_2d_is_contiguous_and_per_pixel():
    x = torch.randn(2, 8, 5, 3)
    out = LayerNorm2d(8)(x)
    assert out.is_contiguous()
    assert torch.allclose(out.mean(1), torch.zeros(2, 5, 3), atol=1e-6)


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match='num_heads=3 for 64 channels'):
        Attention(64, 3)


def test_mixer_refuses_odd_width():
    with pytest.raises(ValueError, match='even number'):
        MambaVisionMixer(15)


def test_states_of_generators_are_left_alone_while_a_graph_is_recorded(monkeypatch):
    block, x = ConvBlock(4), torch.randn(2, 4, 5, 5, requires_grad=True)
    monkeypatch.setattr('mmhybrid.layers.recompute._recording', lambda x: True)
    monkeypatch.setattr(torch, 'get_rng_state', lambda: pytest.fail('asked for'))
    recomputed(block, x, draws=False).sum().backward()
    assert x.grad is not None
    with pytest.raises(pytest.fail.Exception, match='asked for'):
        recomputed(block, x)


def test_recomputing_changes_nothing_but_memory():
    def run(recompute):
        torch.manual_seed(0)
        block = ConvBlock(4, drop_path=0.5)
        x = torch.randn(6, 4, 5, 5, requires_grad=True)
        out = recomputed(block, x) if recompute else block(x)
        out.square().sum().backward()
        return [out, x.grad, *block.state_dict().values(), *(p.grad for p in block.parameters())]

    for plain, again in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, again)
