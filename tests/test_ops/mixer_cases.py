"""Cases of the fused MambaVision mixer, run by test_mambavision_mixer.py in their own process."""

from unittest import mock

import pytest
import torch
from interpreter import DEVICE, begin_cases, generator
from torch import nn

from mmhybrid.layers import MambaVisionMixer, recomputed
from mmhybrid.ops import mambavision_mixer
from mmhybrid.ops.mambavision_mixer import fused, passes
from mmhybrid.ops.mambavision_mixer.reference import prescan_reference
from mmhybrid.ops.selective_scan import passes as scan_passes
from mmhybrid.ops.selective_scan import plan as plans

begin_cases()
pytestmark = pytest.mark.gpu

# The interpreter cuts off where a GPU rounds, so one unit in the last place, not half of one.
STORED = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def relative_rms(got, expected):
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape and got.isfinite().all()
    scale = expected.square().mean().sqrt().item()
    return (got - expected).square().mean().sqrt().item() / (scale or 1)


def make_mixer(dim, **options):
    """A mixer whose taps, biases and steps are as large as those of a trained one."""
    torch.manual_seed(1)
    mixer = MambaVisionMixer(dim, **options)
    with torch.no_grad():
        for name in ('in_proj', 'x_proj', 'out_proj'):
            weight = getattr(mixer, name).weight
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        mixer.D.normal_()
        mixer.dt_proj.bias.add_(1)
        mixer.A_log.add_(0.1 * torch.randn_like(mixer.A_log))
    return mixer


def results(mixer, x, dy, autocast=None, run=None):
    """The output and every gradient by name, in a dictionary."""
    mixer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        y = (mixer if run is None else run)(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    return {'y': y.detach(), 'x': x.grad.clone()} | grads


def compare(fused_mixer, x, tolerance, autocast=None, run=None, **more):
    """The fused mixer against the plain module in float64; returns the fused results."""
    dy = torch.randn(x.shape, generator=generator(5))
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        assert fused_mixer.path(x) == 'fused'
    got = results(fused_mixer, x, dy, autocast, run)
    twin = MambaVisionMixer(x.shape[-1], backend='torch', fused=False, **more).double()
    twin.load_state_dict(fused_mixer.state_dict())
    assert twin.path(x.double()) == 'plain'
    expected = results(twin, x.double(), dy.double())
    assert len(expected) == 2 + 9
    for name, value in got.items():
        # Sums over tokens cancel, and their error is that of the terms.
        error = relative_rms(value, expected[name])
        assert error <= tolerance * (1 if name == 'y' else 4), f'{name}: {error:.1e}'
    return got


@pytest.mark.parametrize(
    ('length', 'dim', 'lean', 'options'),
    [
        (1, 8, False, {}),
        (7, 136, True, dict(state_dim=2, dt_rank=3)),  # 68 channels: two blocks and a ragged one
        (21, 12, False, dict(conv_size=5, state_dim=2)),
        (21, 12, True, dict(conv_size=1, state_dim=1)),
        (64, 80, False, dict(state_dim=1)),  # 40 channels, one block of 64
    ],
    ids=str,
)
def test_every_gradient(length, dim, lean, options):
    x = torch.randn(1 if dim > 64 else 2, length, dim)
    mixer = make_mixer(dim, fused=True, lean=lean, **options)
    got = compare(mixer, x, 2e-6, **options)
    assert got['y'].dtype == torch.float32


@pytest.mark.parametrize(('causal', 'branch'), [
    (True, 'concat'), (False, 'gate'), (True, 'linear-gate'), (False, 'none')])
def test_other_forms_are_layers_around_the_kernels_of_the_scan(causal, branch):
    options = dict(state_dim=2, causal=causal, branch=branch)
    mixer, x, dy = make_mixer(12, backend='triton', **options), *torch.randn(2, 2, 7, 12)
    assert mixer.path(x) == 'plain'
    run = scan_passes.Forward.run
    with mock.patch.object(scan_passes.Forward, 'run', autospec=True, side_effect=run) as scans, \
            mock.patch.object(mambavision_mixer, 'mix', side_effect=AssertionError):
        got = results(mixer, x, dy)
    assert scans.call_count == 1
    twin = MambaVisionMixer(12, backend='torch', **options).double()
    twin.load_state_dict(mixer.state_dict())
    expected = results(twin, x.double(), dy.double())
    assert set(got) == set(expected) and len(got) == 2 + 9 - (branch in ('linear-gate', 'none'))
    for name, value in got.items():
        error = relative_rms(value, expected[name])
        assert error <= 2e-6 * (1 if name == 'y' else 4), f'{name}: {error:.1e}'


def test_every_run_gives_the_same_bits():
    mixer, x = make_mixer(136, fused=True, state_dim=1), torch.randn(1, 3, 136)
    first = results(mixer, x, torch.ones_like(x))
    for name, value in results(mixer, x, torch.ones_like(x)).items():
        assert torch.equal(value, first[name]), f'{name} differs from run to run'


@pytest.mark.parametrize(('tokens', 'lean'), [(4, False), (4, True), (12, False)])
def test_kept_states(tokens, lean, monkeypatch):
    """A scan that is cut: in chunks that are kept as they are, and in some that are thinned."""
    plan = plans.launch_plan

    def cut(*sizes, gradients, chunk=0):
        return plan(*sizes, gradients=gradients, chunk=chunk or tokens)

    fused.forget()
    monkeypatch.setattr(plans, 'launch_plan', cut)
    monkeypatch.setattr(passes, '_MIN_CHUNK', 8)
    x = torch.randn(1, 13, 8)
    mixer = make_mixer(8, fused=True, lean=lean, state_dim=3)
    compare(mixer, x, 2e-6, state_dim=3)
    weights = [p.detach().flatten(1) if p.dim() == 3 else p.detach() for p in weights_of(mixer)]
    states = torch.ops.mmhybrid.mambavision_mixer(x, *weights, lean)[-1]
    fused.forget()
    # Of four chunks every second one, or both of two.
    assert states.shape == ((0,) if lean else (1, 2, 3, 4))


def weights_of(mixer):
    return (mixer.in_proj.weight, mixer.conv1d_x.weight, mixer.conv1d_z.weight,
            mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D,
            mixer.out_proj.weight)


def test_half_precision_parameters():
    dtype = torch.bfloat16
    mixer = make_mixer(24, fused=True, state_dim=2).to(dtype)
    got = compare(mixer, torch.randn(2, 11, 24).to(dtype), 2 * STORED[dtype], state_dim=2)
    assert {value.dtype for value in got.values()} == {dtype}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stores_halves_and_keeps_gradients_whole(dtype):
    mixer = make_mixer(24, fused=True, state_dim=2)
    x = torch.randn(2, 11, 24)
    got = compare(mixer, x, 2 * STORED[dtype], autocast=dtype, state_dim=2)
    assert got.pop('y').dtype == dtype
    assert {value.dtype for value in got.values()} == {torch.float32}
    with torch.autocast(DEVICE, dtype=dtype):
        plain = MambaVisionMixer(24, fused=False)(torch.randn(2, 19, 24))
    assert plain.dtype == dtype


def test_backward_inside_autocast():
    mixer, x = make_mixer(8, fused=True, state_dim=1), torch.randn(1, 5, 8)
    dy = torch.randn(1, 5, 8)
    outside = results(mixer, x, dy)
    y = mixer(x)
    mixer.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y.backward(dy)
    for name, p in mixer.named_parameters():
        assert torch.equal(p.grad, outside[name]), name


def test_checkpointing_changes_nothing():
    mixer, x = make_mixer(12, fused=True, state_dim=2), torch.randn(1, 6, 12)
    dy = torch.randn(1, 6, 12)
    calls = []
    mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = results(mixer, x, dy)
    again = results(mixer, x, dy, run=lambda t: recomputed(mixer, t))
    assert len(calls) == 3
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


def test_tokens_with_strides():
    x = torch.randn(2, 12, 9).transpose(1, 2)
    compare(make_mixer(12, fused=True, state_dim=1), x, 2e-6, state_dim=1)


def test_frozen_input_and_parameters():
    mixer = make_mixer(8, fused=True, state_dim=1)
    mixer.conv1d_x.weight.requires_grad_(False)
    mixer(torch.randn(1, 6, 8)).sum().backward()
    assert mixer.conv1d_x.weight.grad is None and mixer.conv1d_z.weight.grad is not None
    with torch.no_grad():
        assert not mixer(torch.randn(1, 6, 8)).requires_grad


@pytest.mark.parametrize(('length', 'steps'), [(21, 1), (70, 2)])
def test_convolutions_against_their_twin(length, steps, monkeypatch):
    """u and the gate half exactly where the concatenation wants them, and all gradients."""
    monkeypatch.setattr(scan_passes, 'processors', lambda _: 1 if steps > 1 else 132)
    channels, shape = 35, passes.Shape(2, length, 0, 1, 0)
    assert passes.cut(shape, channels, torch.device(DEVICE))['steps'] == steps
    xz = torch.randn(2 * length, 2 * channels)
    mixer = MambaVisionMixer(2 * channels)
    weights = passes.Weights(*(w.detach() for w in weights_of(mixer)))
    filters = [torch.randn(channels, 3) for _ in range(2)]
    weights = weights._replace(w_conv_x=filters[0], w_conv_z=filters[1])
    yz = torch.full_like(xz, 7.0)
    pointers = [w.data_ptr() for w in weights.read]
    kernel = passes.Convolutions(xz, weights, shape, gate=True, backward=False)
    (u, A, step_bias), _ = kernel.run(xz, yz, weights, pointers)
    torch.testing.assert_close(A, -mixer.A_log.exp().detach())
    assert torch.equal(step_bias, 2 * mixer.dt_proj.bias.detach())
    du, dyz = torch.randn_like(u), torch.randn_like(yz)
    dA, dstep = torch.randn_like(A), torch.randn_like(step_bias)
    dlog, dbias = dA * A, 2 * dstep
    kernel = passes.Convolutions(xz, weights, shape, gate=False, backward=True)
    dxz, dw = kernel.run_backward(xz, A, du, dyz, dA, dstep, weights, pointers)
    assert torch.equal(dA, dlog) and torch.equal(dstep, dbias)

    leaves = [x.double().requires_grad_() for x in (xz, *filters)]
    twins = prescan_reference(leaves[0].view(2, length, -1), *leaves[1:])
    twins = [twin.reshape(-1, channels) for twin in twins]
    expected = torch.autograd.grad(twins, leaves, (du.double(), dyz[:, channels:].double()))
    assert relative_rms(u, twins[0].detach()) < 3e-7
    assert relative_rms(yz[:, channels:], twins[1].detach()) < 3e-7
    assert torch.equal(yz[:, :channels], torch.full_like(u, 7.0))
    assert relative_rms(dxz, expected[0]) < 3e-7
    assert relative_rms(dw, torch.stack(expected[1:])) < 1e-6


def as_operator(mixer, x, dy, autocast=None):
    """The results of the registered operators, which take a call that cannot be described."""
    with mock.patch.object(fused.launch, 'describe', lambda tensors: None):
        return results(mixer, x, dy, autocast)


@pytest.mark.parametrize('case', ['plain', 'lean', 'halves', 'autocast', 'odd strides', 'frozen'])
def test_calls_give_the_bits_of_the_operators(case):
    lean, dtype = case == 'lean', torch.bfloat16 if case == 'halves' else torch.float32
    mixer = make_mixer(12, fused=True, state_dim=2, lean=lean).to(dtype)
    x, dy = torch.randn(2, 5, 12).to(dtype), torch.randn(2, 5, 12)
    if case == 'odd strides':
        x = x.mT.contiguous().mT
        dy = dy.mT.contiguous().mT
        for name in ('A_log', 'D'):
            p = getattr(mixer, name)
            p.data = torch.stack([p.data, p.data], -1)[..., 0]
    if case == 'frozen':
        mixer.D.requires_grad_(False)
        mixer.D.grad = torch.zeros_like(mixer.D)
        mixer.zero_grad = lambda: None
        for p in mixer.parameters():
            p.grad = torch.zeros_like(p)
    autocast = torch.bfloat16 if case == 'autocast' else None
    with mock.patch.object(fused, '_through_operator', lambda *_: pytest.fail('an operator')):
        got = results(mixer, x, dy, autocast)
    for p in mixer.parameters():
        p.grad = torch.zeros_like(p)
    expected = as_operator(mixer, x, dy, autocast)
    assert bool(got['D'].any()) == (case != 'frozen')
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].dtype == value.dtype, name
    with torch.no_grad(), torch.autocast('cpu', autocast, enabled=autocast is not None):
        assert torch.equal(mixer(x), got['y'])


def test_the_output_may_be_changed_in_place():
    mixer, x = make_mixer(8, fused=True, state_dim=1), torch.randn(1, 5, 8)
    y = mixer(x)
    y.mul_(2)
    y.sum().backward()
    assert mixer.D.grad.any()


def test_weights_that_were_changed_before_the_backward_pass():
    mixer, x = make_mixer(8, fused=True, state_dim=1), torch.randn(1, 5, 8)
    y = mixer(x)
    with torch.no_grad():
        mixer.D.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_saved_tensors_that_come_back_changed():
    """A hook may keep copies with other strides and addresses."""
    mixer, x = make_mixer(8, fused=True, state_dim=2), torch.randn(2, 20, 8)
    dy = torch.randn(2, 20, 8)
    expected = results(mixer, x, dy)

    def unpack(given):
        odd = torch.zeros(*given.shape, 2, dtype=given.dtype)[..., 1]
        return odd.copy_(given)

    with torch.autograd.graph.saved_tensors_hooks(lambda given: given, unpack):
        got = results(mixer, x, dy)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


# The contract with PyTorch.


@pytest.mark.parametrize('lean', [False, True])
def test_opcheck(lean):
    mixer = make_mixer(8, fused=True, state_dim=1)
    weights = [w.detach().flatten(1) if w.dim() == 3 else w.detach() for w in weights_of(mixer)]
    arguments = [x.requires_grad_() for x in (torch.randn(1, 3, 8), *weights)]
    forward = torch.ops.mmhybrid.mambavision_mixer.default
    quick = ('test_schema', 'test_faketensor')
    more = ('test_autograd_registration', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(forward, (*arguments, lean), test_utils=quick if lean else quick + more)
    x, *weights = (a.detach() for a in arguments)
    out, *kept = forward(x, *weights, lean)
    backward = torch.ops.mmhybrid.mambavision_mixer_backward.default
    torch.library.opcheck(backward, (out, x, *kept, *weights, lean), test_utils=quick)


def test_compiled_module():
    mixer, x = make_mixer(8, state_dim=2), torch.randn(2, 6, 8)
    # 'auto' on a CPU, where the scan is not Triton's
    assert mixer.path(x) == ('plain' if DEVICE == 'cpu' else 'fused')
    mixer.backend = 'triton'
    assert mixer.path(x) == 'fused'
    dy = torch.randn(2, 6, 8)
    eager = results(mixer, x, dy)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == 'call_function')
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    for name, value in results(mixer, x, dy, run=compiled).items():
        torch.testing.assert_close(value, eager[name], msg=name)
    assert any('mambavision_mixer' in target for target in seen), seen


@pytest.mark.parametrize('of', ['x', 'weights'])
@pytest.mark.parametrize('autocast', [False, True])
def test_second_derivative_is_refused(of, autocast):
    x = torch.randn(1, 3, 8, requires_grad=of == 'x')
    mixer = make_mixer(8, fused=True, state_dim=1).requires_grad_(of == 'weights')
    leaf = x if of == 'x' else mixer.in_proj.weight
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = mixer(x)
    (grad,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='first derivative only'):
        torch.autograd.grad(grad.sum(), leaf)


def test_double_precision_is_refused_or_plain():
    x = torch.randn(1, 3, 8).double()
    with pytest.raises(RuntimeError, match='float32, bfloat16 and float16'):
        MambaVisionMixer(8, fused=True).double()(x)
    assert MambaVisionMixer(8).double().path(x) == 'plain'
    with pytest.raises(RuntimeError, match='at most 16 states'):
        MambaVisionMixer(8, fused=True, state_dim=17)(x.float())
