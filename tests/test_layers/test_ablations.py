"""Settings of the papers' ablations: other forms of the mixers and of attention over directions."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmhybrid.layers import (
    Attention,
    ChannelAttention,
    LocalSS2D,
    LocalVimMixer,
    MambaVisionMixer,
    SpatialChannelAttention,
    merge_directions,
)
from mmhybrid.layers.mixers.mambavision import BRANCHES
from mmhybrid.layers.weight_casts import _castable
from mmhybrid.models.backbones.localvim import LocalVim
from mmhybrid.models.backbones.localvmamba import LocalVMamba
from mmhybrid.models.backbones.mambavision import (
    PATTERNS,
    HybridStage,
    MambaVision,
    attention_blocks,
)
from mmhybrid.models.classifiers import LocalVMambaClassifier, MambaVisionClassifier
from mmhybrid.ops import selective_scan

SMALL = dict(dim=8, stem_width=8, depths=(1, 1, 4, 3), num_heads=(1, 2, 4, 8),
             window_size=(8, 8, 4, 2), mlp_ratio=2)


# --- MambaVision's mixer -------------------------------------------------------------------------


def expected_mixer(mixer, x):
    """The mixer written out, one step after the other."""
    E, size = mixer.D.numel(), mixer.conv1d_x.kernel_size[0]
    before = size - 1 if mixer.causal else size // 2
    xz = F.linear(x, mixer.in_proj.weight).mT
    u = F.pad(xz[:, :E], (before, size - 1 - before))
    u = F.silu(F.conv1d(u, mixer.conv1d_x.weight, groups=E))
    step, B, C = F.linear(u.mT, mixer.x_proj.weight).mT.split(
        [mixer.dt_rank, mixer.state_dim, mixer.state_dim], dim=1)
    y = selective_scan(
        u, F.linear(step.mT, mixer.dt_proj.weight).mT, -mixer.A_log.exp(), B, C, D=mixer.D,
        delta_bias=2 * mixer.dt_proj.bias, delta_softplus=True, backend='reference')
    z = xz[:, E:]
    if mixer.branch in ('concat', 'gate'):
        z = F.conv1d(F.pad(z, (size // 2, size // 2)), mixer.conv1d_z.weight, groups=E)
    z = F.silu(z)
    y = dict(concat=lambda: torch.cat([y, z], 1), none=lambda: y).get(
        mixer.branch, lambda: y * z)()
    return F.linear(y.mT, mixer.out_proj.weight)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('branch', BRANCHES)
def test_mixer_is_what_it_says(branch, causal):
    torch.manual_seed(0)
    mixer, x = MambaVisionMixer(16, causal=causal, branch=branch), torch.randn(2, 11, 16)
    nn.init.normal_(mixer.dt_proj.bias)
    torch.testing.assert_close(mixer(x), expected_mixer(mixer, x), rtol=1e-5, atol=1e-6)
    mixer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


@pytest.mark.parametrize(('branch', 'causal', 'reads_later'), [
    ('none', True, False), ('none', False, True), ('linear-gate', True, False),
    ('gate', True, True), ('concat', True, True)])  # the other branch convolves both ways
def test_what_a_token_sees(branch, causal, reads_later):
    mixer, x = MambaVisionMixer(16, causal=causal, branch=branch), torch.randn(1, 9, 16)
    x.requires_grad_()
    mixer(x)[:, 4].square().sum().backward()
    assert bool(x.grad[:, 5:].any()) is reads_later
    assert x.grad[:, :5].any(dim=-1).all()


def test_the_published_mixer_has_its_keys_and_others_no_more():
    keys = {branch: set(MambaVisionMixer(16, branch=branch).state_dict()) for branch in BRANCHES}
    assert keys['concat'] == keys['gate'] == set(MambaVisionMixer(16).state_dict())
    assert keys['concat'] - keys['none'] == {'conv1d_z.weight'} == keys['gate'] - keys[
        'linear-gate']
    shapes = {branch: tuple(MambaVisionMixer(16, branch=branch).out_proj.weight.shape)
              for branch in BRANCHES}
    assert shapes == {'concat': (16, 16), 'gate': (16, 8), 'linear-gate': (16, 8),
                      'none': (16, 8)}


def test_only_the_published_mixer_has_kernels():
    x = torch.randn(1, 4, 16)
    for options in (dict(branch='gate'), dict(causal=True)):
        assert MambaVisionMixer(16, **options).path(x) == 'plain'
        with pytest.raises(ValueError, match='kernels are written for causal=False and branch='):
            MambaVisionMixer(16, fused=True, **options)
    with pytest.raises(ValueError, match="got branch='gated', expected one of concat, gate, "):
        MambaVisionMixer(16, branch='gated')


# --- patterns of a stage -------------------------------------------------------------------------


@pytest.mark.parametrize(('pattern', 'depth', 'blocks'), [
    ('last-half', 8, 'MMMMSSSS'), ('first-half', 8, 'SSSSMMMM'), ('last-quarter', 8, 'MMMMMMSS'),
    ('attention-first', 8, 'SMSMSMSM'), ('scan-first', 8, 'MSMSMSMS'),
    ('last-half', 5, 'MMMSS'), ('first-half', 5, 'SSMMM'), ('attention-first', 5, 'SMSMM'),
    ('scan-first', 5, 'MSMSM'), ('last-quarter', 5, 'MMMMS'), ('last-quarter', 3, 'MMM'),
    ('last-half', 1, 'M'), ('scan-first', 1, 'M'), ('random', 1, 'M')])
def test_patterns_are_those_of_the_paper(pattern, depth, blocks):
    chosen = attention_blocks(pattern, depth)
    assert ''.join('S' if i in chosen else 'M' for i in range(depth)) == blocks


def test_random_patterns_are_drawn_once_and_differ_from_the_others():
    for depth in (4, 8, 11):
        drawn = attention_blocks('random', depth)
        assert drawn == attention_blocks('random', depth) and len(drawn) == depth // 2
        assert all(drawn != attention_blocks(p, depth) for p in PATTERNS if p != 'random')


@pytest.mark.parametrize('tight', [False, True])
@pytest.mark.parametrize('pattern', PATTERNS)
def test_stages_go_through_their_blocks(pattern, tight):
    """On a map that windows do not divide: the shorter way leaves nothing out."""
    torch.manual_seed(0)
    stage = HybridStage(16, 2, 4, [0.0] * 4, pattern=pattern, tight=tight, downsample=False).eval()
    kinds = [isinstance(block.mixer, Attention) for block in stage.blocks]
    assert {i for i, is_attention in enumerate(kinds) if is_attention} == attention_blocks(
        pattern, 4)
    x = torch.randn(1, 16, 4 if tight else 6, 3)
    padded = x if tight else F.pad(x, (0, 1, 0, 2))
    height, width = padded.shape[2:]
    rows = []
    for top in range(0, height, 4):
        tokens = padded[:, :, top:top + 4].flatten(2).mT
        for block in stage.blocks:
            tokens = block(tokens)
        rows.append(tokens.mT.unflatten(2, (4, width)))
    torch.testing.assert_close(stage(x), torch.cat(rows, 2)[:, :, :x.shape[2], :x.shape[3]],
                               rtol=1e-4, atol=1e-5)


def test_a_stage_of_one_block_of_attention():
    stage = HybridStage(16, 2, 4, [0.0], downsample=False).eval()
    stage.blocks[0].mixer = Attention(16, 2)
    assert stage(torch.randn(1, 16, 5, 3)).shape == (1, 16, 5, 3)


@pytest.mark.parametrize('options', [
    dict(pattern='scan-first', mixer_branch='gate'), dict(pattern='random', causal_mixer=True),
    dict(pattern='last-quarter', mixer_branch='none', with_cp=True)], ids=str)
def test_backbones_take_them(options):
    torch.manual_seed(0)
    model = MambaVision(SMALL, drop_path_rate=0.0, **options)
    maps = model(torch.randn(2, 3, 72, 56))
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())
    mixers = [m for m in model.modules() if isinstance(m, MambaVisionMixer)]
    assert {m.branch for m in mixers} == {options.get('mixer_branch', 'concat')}
    assert {m.causal for m in mixers} == {options.get('causal_mixer', False)}
    classifier = MambaVisionClassifier(SMALL, num_classes=3, **options)
    assert set(classifier.levels.state_dict()) == set(model.levels.state_dict())


@pytest.mark.parametrize(('cls', 'options', 'error', 'words'), [
    (MambaVision, dict(pattern='last_half'), ValueError, "pattern='last_half'; did you mean 'last"),
    (MambaVision, dict(mixer_branch='gated'), ValueError, "mixer_branch='gated'; did you mean 'ga"),
    (MambaVision, dict(causal_mixer=1), TypeError, 'causal_mixer'),
    (MambaVision, dict(fused_mixer=True, mixer_branch='gate'), ValueError, 'kernels are written'),
    (MambaVisionClassifier, dict(pattern_='x'), TypeError, "did you mean 'pattern'"),
    (LocalVMamba, dict(attention='spatial'), ValueError, "attention='spatial', expected one of ch"),
    (LocalVim, dict(attention=None), ValueError, 'attention=None, expected one of channel, '),
    (LocalVMambaClassifier, dict(attention=True), ValueError, 'attention=True, expected one of'),
])
def test_other_values_are_refused(cls, options, error, words):
    with pytest.raises(error, match=words):
        cls('tiny', **options)


# --- attention over directions -------------------------------------------------------------------


def test_spatial_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    attention, x = SpatialChannelAttention(16), torch.randn(2, 5, 3, 16)
    for p in attention.parameters():
        nn.init.normal_(p, std=0.5)
    norm, reduce, select = attention.norm, attention.global_reduce, attention.channel_select
    own, spatial = attention.local_reduce, attention.spatial_select
    expected = torch.empty_like(x)
    for b in range(2):
        for k in range(3):
            tokens = F.layer_norm(x[b, :, k], (16,), norm.weight, norm.bias, norm.eps)
            whole = F.gelu(F.linear(tokens.mean(0), reduce.weight, reduce.bias))
            channels = F.linear(whole, select.weight, select.bias).sigmoid()
            for token in range(5):
                part = F.gelu(F.linear(tokens[token], own.weight, own.bias))
                share = F.linear(torch.cat([part, whole]), spatial.weight, spatial.bias).sigmoid()
                expected[b, token, k] = x[b, token, k] * channels * share
    torch.testing.assert_close(attention(x), expected)
    released = ChannelAttention(16)
    released.load_state_dict(attention.state_dict(), strict=False)
    assert set(attention.state_dict()) - set(released.state_dict()) == {
        f'{name}.{kind}' for name in ('local_reduce', 'spatial_select')
        for kind in ('weight', 'bias')}


def test_without_attention_directions_are_summed():
    ys = [torch.randn(2, 3, 4, 7), torch.randn(2, 1, 4, 7)]
    torch.testing.assert_close(merge_directions(ys, None), torch.cat(ys, 1).sum(1).mT)


@pytest.mark.parametrize('directions', [('h', 'v_flip', 'w2'), ('h',), None])
@pytest.mark.parametrize('attention', ['none', 'channel-spatial', 'channel'])
def test_mixers_agree_on_all_backends(attention, directions):
    """The compiled scan has kernels for the released attention alone, and must not use them."""
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 4, 16)
    mixer = LocalSS2D(16, directions, attention=attention, state_dim=2, float32_scan=True)
    results = {}
    for backend in ('reference', 'torch', 'auto'):
        mixer.backend = backend
        results[backend] = mixer(maps)
    torch.testing.assert_close(results['auto'], results['reference'], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results['torch'], results['reference'], rtol=1e-4, atol=1e-5)
    mixer = LocalVimMixer(16, directions, attention=attention, state_dim=2)
    tokens = torch.randn(2, 20, 16)
    mixer.backend = 'reference'
    expected = mixer(tokens, (5, 4))
    mixer.backend = 'auto'
    torch.testing.assert_close(mixer(tokens, (5, 4)), expected, rtol=1e-4, atol=1e-5)


def test_default_networks_have_the_released_attention():
    arch = dict(dim=16, depths=(1, 1, 1, 1))
    directions = [['h', 'w7']] * 4
    assert set(LocalVMamba(arch, directions=directions).state_dict()) == set(
        LocalVMamba(arch, directions=directions, attention='channel').state_dict())
    none = LocalVMamba(arch, directions=directions, attention='none')
    assert not [name for name in none.state_dict() if '.attn.' in name]
    model = LocalVim(dict(dim=16, depth=2), directions=[['h']] * 2, attention='channel-spatial',
                     out_indices=(1,))
    assert 'layers.0.mixer.attn.spatial_select.weight' in model.state_dict()


def test_autocast_copies_what_other_forms_have():
    """Names that a module says it reads itself exist in every form."""
    for options in (dict(mixer_branch='none'), dict(mixer_branch='gate', causal_mixer=True)):
        model = MambaVision(SMALL, **options)
        names = {id(m): n for n, m in model.named_modules()}
        cast = {f'{names[id(m)]}.{name}' for m, name in _castable(model)}
        assert not [name for name in cast if 'conv1d' in name or name.endswith('dt_proj.bias')]
    for attention in ('none', 'channel-spatial'):
        model = LocalVMamba(dict(dim=16, depths=(1, 1, 1, 1)), directions=[['h']] * 4,
                            attention=attention)
        assert [*_castable(model)]
