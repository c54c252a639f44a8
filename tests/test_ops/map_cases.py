"""Cases of the kernels around SS2D, run by test_maps_triton.py in a process of their own.

The convolution, the merge of directions and the mixers on Triton's kernels, compiled or interpreted
(interpreter.py), against plain PyTorch in float64. The name of this file keeps pytest from
collecting it together with the other tests.
"""

from unittest import mock

import pytest
import torch
from interpreter import DEVICE, begin_cases, generator
from plain_ss2d import plain_local_ss2d, plain_ss2d
from scan_cases import assert_same
from torch._subclasses import FakeTensorMode

from mmhybrid.layers.mixers import ss2d
from mmhybrid.layers.mixers.ss2d import SS2D, LocalSS2D
from mmhybrid.ops.map_conv import conv, map_conv, map_conv_reference
from mmhybrid.ops.merge_norm import attend, merge, merge_norm, merge_norm_reference

begin_cases()
pytestmark = pytest.mark.gpu


def randn(seed, *shape):
    return torch.randn(*shape, generator=generator(seed))


def results(function, leaves, seed=9):
    """Output and gradients, by position."""
    y = function(*leaves)
    weight = randn(seed, *y.shape).to(y.dtype)
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad((y * weight).sum(), wanted)
    return {'y': y.detach()} | {f'gradient {i}': g for i, g in enumerate(grads)}


def leaves_of(*tensors, dtype=torch.float32):
    return [x if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]


# --- the convolution ------------------------------------------------------------------------------

@pytest.mark.parametrize(('shape', 'half', 'bias'), [
    ((1, 1, 1, 3), False, True), ((2, 7, 5, 70), True, True), ((1, 13, 9, 8), True, False),
    ((2, 1, 6, 2), True, False), ((1, 6, 1, 2), False, True)], ids=str)
def test_map_conv(shape, half, bias):
    E = shape[-1]
    given = (randn(0, *shape[:3], 2 * E if half else E), randn(1, E, 1, 3, 3),
             randn(2, E) if bias else None)
    found, expected = (
        results(lambda u, w, b, f=f: f(u[..., :E], w, b), leaves_of(*given, dtype=dtype))
        for f, dtype in ((map_conv, torch.float32), (map_conv_reference, torch.float64))
    )
    assert_same(found, expected, 1e-5)


def test_map_conv_of_rows_that_are_apart():
    """Rows of a larger map are copied: no one stride leads through all pixels."""
    whole = randn(0, 1, 4, 7, 3)
    weight = randn(1, 3, 1, 3, 3)
    found, expected = (
        results(lambda u, w, f=f: f(u[:, :, :5], w), leaves_of(whole, weight, dtype=dtype))
        for f, dtype in ((map_conv, torch.float32), (map_conv_reference, torch.float64))
    )
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize('shape', [(0, 2, 3, 4), (1, 0, 3, 4)])
def test_map_conv_of_nothing(shape):
    leaves = leaves_of(torch.zeros(shape), randn(1, 4, 1, 3, 3), randn(2, 4))
    y = map_conv(*leaves)
    assert y.shape == shape
    for x, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_map_conv_is_an_operator():
    leaves = leaves_of(randn(0, 2, 2, 2, 4), randn(1, 4, 1, 3, 3), randn(2, 4))
    torch.library.opcheck(torch.ops.mmhybrid.map_conv.default, leaves)
    assert_fakes_tell_the_truth(
        torch.ops.mmhybrid.map_conv_backward, randn(3, 2, 2, 2, 4), *leaves)
    (du,) = torch.autograd.grad(map_conv(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='first derivative only'):
        du.sum().backward()
    with pytest.raises(ValueError, match=r'weight \(E, 1, 3, 3\).*got \(2, 2, 2, 4\), \(3, 1, 3'):
        map_conv(leaves[0], leaves[1][:3])


def assert_fakes_tell_the_truth(operator, *tensors):
    """Compiled code relies on the layouts that the fakes announce."""
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in tensors]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = operator(*plain)
    found = operator(*plain)
    if isinstance(found, torch.Tensor):
        found, fakes = [found], [fakes]
    for one, fake in zip(found, fakes, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (fake.shape, fake.stride(), fake.dtype)


# --- sum, norm and gate ---------------------------------------------------------------------------

MERGED = [(2, 4, 5, 7, True), (1, 1, 96, 3, False), (2, 3, 300, 9, True), (1, 8, 16, 1, False)]


def merge_inputs(B, K, D, L, gate):
    return (randn(0, B, L, K, D).permute(0, 2, 3, 1), randn(1, D), randn(2, D),
            randn(3, B, L, 2 * D) if gate else None)


@pytest.mark.parametrize('sizes', MERGED, ids=str)
def test_merge_norm(sizes):
    D = sizes[2]

    def run(function, dtype):
        def call(y, weight, bias, gate):
            return function(y, weight, bias, 1e-5, gate if gate is None else gate[..., D:])

        return results(call, leaves_of(*merge_inputs(*sizes), dtype=dtype))

    assert_same(run(merge_norm, torch.float32), run(merge_norm_reference, torch.float64), 1e-5)


def test_merge_norm_is_an_operator():
    y, weight, bias, gate = leaves_of(*merge_inputs(1, 2, 4, 3, True))
    gate = gate.detach()[..., :4].requires_grad_()
    arguments = (y, weight, bias, gate, 1e-5, torch.float32)
    torch.library.opcheck(
        torch.ops.mmhybrid.merge_norm.default, arguments,
        test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'))
    out, total, stats = torch.ops.mmhybrid.merge_norm(*arguments)
    assert_fakes_tell_the_truth(torch.ops.mmhybrid.merge_norm, *arguments)
    assert_fakes_tell_the_truth(
        torch.ops.mmhybrid.merge_norm_backward, out, total, stats, weight, bias, gate)
    (dy,) = torch.autograd.grad(merge_norm(*arguments[:3], 1e-5, gate).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match='first derivative only'):
        dy.sum().backward()
    with pytest.raises(ValueError, match=r'gate \(B, L, D\) or None, got \(1, 2, 4, 3\).*\(3,\)'):
        merge_norm(y, weight[:3], bias, 1e-5)


def test_rounds_once():
    """The sum of bfloat16 results is in float32, and so is its norm."""
    y, weight, bias, _ = merge_inputs(1, 4, 32, 5, False)
    y = y.bfloat16()
    expected = merge_norm_reference(y.double(), weight.double(), bias.double(), 1e-5)
    found = merge_norm(y, weight, bias, 1e-5, dtype=torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# --- the mixers -----------------------------------------------------------------------------------

FORMS = {
    'current': dict(channel_first=True),
    'last': dict(channel_first=False),
    'gated': dict(gate=True, conv_bias=True, state_dim=2),
    'float32': dict(gate=True, conv_bias=True, float32_scan=True),
    'released': dict(v_restore='released'),
}


def compare(module, plain, x):
    """Output and gradients by name against the plain form in float64."""
    found = []
    for dtype, function in ((torch.float32, module), (torch.float64, plain)):
        module.to(dtype).zero_grad()
        image = x.detach().to(dtype).requires_grad_()
        y = function(image)
        (y * randn(1, *y.shape).to(dtype)).sum().backward()
        found.append({'y': y.detach(), 'gradient of x': image.grad} | {
            f'gradient of {name}': p.grad.clone() for name, p in module.named_parameters()})
    assert_same(*found, 2e-5)


@pytest.mark.parametrize(('form', 'size'), [
    ('current', (3, 2)), ('gated', (2, 3)), ('released', (2, 2)), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in (
            ('last', (1, 1)), ('float32', (1, 2)), ('released', (2, 3)), ('current', (7, 5)),
            ('gated', (13, 9))))], ids=str)
def test_ss2d_like_its_plain_form(form, size):
    torch.manual_seed(0)
    mixer = SS2D(4, backend='triton', **FORMS[form])
    shape = (2, 4, *size) if mixer.channel_first else (2, *size, 4)
    with mock.patch.object(ss2d, 'map_conv', wraps=map_conv) as convolution, \
            mock.patch.object(ss2d, 'merge_norm', wraps=merge_norm) as merging:
        compare(mixer, lambda x: plain_ss2d(mixer, x), randn(0, *shape))
    assert convolution.call_count == 1
    # results of the released restore lie apart, unless the map is square
    assert merging.call_count == (form != 'released' or size == (2, 2))


@pytest.mark.parametrize(('size', 'directions'), [
    ((3, 2), ('h', 'v_flip')),
    pytest.param((1, 1), ('w2', 'w2_flip'), marks=pytest.mark.slow),
    pytest.param((7, 5), ('h', 'v_flip', 'w2'), marks=pytest.mark.slow)], ids=str)
def test_local_ss2d_like_its_plain_form(size, directions):
    torch.manual_seed(0)
    mixer = LocalSS2D(8, directions, state_dim=2, conv_bias=True, backend='triton')
    with mock.patch.object(ss2d, 'attend_norm', wraps=ss2d.attend_norm) as attention:
        compare(mixer, lambda x: plain_local_ss2d(mixer, x), randn(0, 2, *size, 8))
    assert attention.call_count == 1


def test_attention_refuses_a_second_derivative():
    mixer = LocalSS2D(8, ('h', 'v'), state_dim=1, backend='triton')
    y = torch.zeros(1, 2, 16, 3).requires_grad_()
    attention = attend.Attention(*mixer.multi_scan.attn.parameters())
    norm = mixer.out_norm
    out = attend.attend_norm(y, attention, 1e-5, norm.weight, norm.bias, 1e-5,
                             torch.ones(1, 3, 16), torch.float32)
    (dy,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dy.sum().backward()


def test_operators_of_the_attention_have_true_fakes():
    y, dsum, logit = randn(0, 2, 3, 5, 4), randn(1, 2, 4, 5), randn(2, 2, 3, 5)
    operators = torch.ops.mmhybrid
    assert_fakes_tell_the_truth(operators.token_sums, y, None, None, 1e-5)
    assert_fakes_tell_the_truth(operators.token_sums, y, dsum, logit, 1e-5)
    assert_fakes_tell_the_truth(operators.direction_gradients, y, dsum, logit, logit, 1e-5)
    assert_fakes_tell_the_truth(operators.merge_attended, y, logit, randn(3, 5), randn(4, 5), dsum,
                                1e-5, torch.float32)


@pytest.mark.parametrize('mixer', [
    lambda: SS2D(8, channel_first=False, backend='triton'),
    lambda: LocalSS2D(8, ('h', 'w2'), state_dim=1, float32_scan=True, backend='triton')],
    ids=['SS2D', 'LocalSS2D'])
def test_mixed_precision(mixer):
    torch.manual_seed(0)
    mixer, x = mixer(), randn(0, 1, 2, 3, 8)
    plain = plain_local_ss2d if isinstance(mixer, LocalSS2D) else plain_ss2d
    expected = plain(mixer, x)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    assert_same({'y': y}, {'y': expected}, 0.06)  # the interpreter cuts off where a GPU rounds
    y.float().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()), name


@pytest.mark.slow
def test_a_half_precision_model():
    torch.manual_seed(0)
    for mixer in (SS2D(8, gate=True, float32_scan=True),
                  LocalSS2D(8, ('h', 'w2'), state_dim=1, float32_scan=True)):
        mixer.backend = 'triton'
        mixer.bfloat16()
        y = mixer(randn(0, 1, 2, 3, 8).bfloat16())
        y.float().sum().backward()
        for name, p in mixer.named_parameters():
            assert p.grad.dtype == torch.bfloat16 and bool(torch.isfinite(p.grad).all()), name


@pytest.mark.slow
def test_who_listens_to_a_norm_is_heard():
    torch.manual_seed(0)
    for mixer, part in ((SS2D(4, backend='triton'), 'out_norm'),
                        (LocalSS2D(8, ('h', 'v'), state_dim=1, backend='triton'), 'out_norm'),
                        (LocalSS2D(8, ('h', 'v'), state_dim=1, backend='triton'),
                         'multi_scan.attn.norm')):
        x = randn(0, 1, 2, 3, mixer.in_proj.in_features)
        expected, heard = mixer(x), []
        mixer.get_submodule(part).register_forward_hook(lambda *_, heard=heard: heard.append(1))
        torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)
        assert heard


def test_calls_give_the_bits_of_the_operators():
    leaves = leaves_of(randn(0, 1, 3, 2, 4), randn(1, 4, 1, 3, 3), dtype=torch.bfloat16)
    merged = leaves_of(*merge_inputs(1, 2, 4, 3, False)[:3])

    def everything():
        return (results(lambda u, w: map_conv(u, w), leaves)
                | {f'merge {k}': v for k, v in results(
                    lambda y, w, b: merge_norm(y, w, b, 1e-5), merged).items()})

    direct = everything()
    for module in (conv, merge):
        module.forget()
    with mock.patch.object(conv.launch, 'eager', lambda: False):
        for name, x in everything().items():
            assert torch.equal(x, direct[name]), name


def test_without_gradients_nothing_is_kept():
    y, weight, bias, _ = merge_inputs(1, 2, 4, 3, False)
    run = merge.Forward.run
    with torch.no_grad(), mock.patch.object(merge.Forward, 'run', autospec=True,
                                            side_effect=run) as forward:
        merge_norm(y, weight, bias, 1e-5)
    assert forward.call_count == 1 and not forward.call_args[0][0].gradients
