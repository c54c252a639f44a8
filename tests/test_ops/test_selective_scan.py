"""The public scan and its PyTorch backends against the sequential reference in float64."""

import importlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_cases import CASES, B, D, L, N, assert_same, make_inputs, run

from mmhybrid.ops import available_backends, selective_scan
from mmhybrid.ops.selective_scan import choose_backend, torch_backend

# `mmhybrid.ops.selective_scan` as an attribute is the function, not the package it lives in.
scan_module = importlib.import_module('mmhybrid.ops.selective_scan')
GOLDEN = Path(__file__).parents[1] / 'data' / 'mambavision'

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(map(str, case)))
def test_torch_path_equals_the_reference(case, dtype):
    *sizes, skip, gate, bias, softplus, reverse = case
    inputs = make_inputs(*sizes, skip=skip, gate=gate, bias=bias, softplus=softplus)
    settings = {'softplus': softplus, 'reverse': reverse}
    expected = run(inputs, backend='reference', **settings)
    found = run({k: x.to(dtype) for k, x in inputs.items()}, backend='torch', **settings)
    assert found['y'].dtype == dtype and found['last_state'].dtype == dtype
    assert_same(found, expected, 1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize('use_y, use_state', [(True, False), (False, True)])
def test_gradient_through_one_output_only(use_y, use_state):
    inputs = make_inputs(gate=True)
    both = [run(inputs, backend=name, use_y=use_y, use_state=use_state)
            for name in ('torch', 'reference')]
    for name in ('grad_C', 'grad_D', 'grad_z'):  # the state does not depend on these
        if not use_y:
            assert not both[0][name].any()
            both[1][name] = both[0][name]
    assert_same(both[0], both[1], 1e-11)


@pytest.mark.parametrize('gate, reverse, groups', [(False, False, None), (True, True, 2)])
def test_gradcheck(gate, reverse, groups):
    inputs = make_inputs(1, 4, 30, 2, groups, gate=gate)
    names = list(inputs)

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True,
                              return_last_state=True, reverse=reverse, backend='torch')

    tensors = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)


PLANS = [
    torch_backend.Plan(*cut)
    for cut in ((1, L, 1), (1, 1, L), (L, 1, 1), (1, 5, 8), (5, 2, 4), (4, 10, 1), (2, 4, 6))
]


@pytest.mark.parametrize('plan', PLANS, ids=str)
def test_result_does_not_depend_on_the_chunks(plan, monkeypatch):
    inputs = make_inputs(gate=True)
    expected = run(inputs, backend='reference', reverse=True)
    asked = []
    monkeypatch.setattr(torch_backend, 'make_plan', lambda *a: asked.append(a) or plan)
    assert_same(run(inputs, backend='torch', reverse=True), expected, 1e-11)
    assert asked == [(L, B * D * N)] * 2  # forward and backward use one plan


@pytest.mark.parametrize('length', [1, 2, 25, 49, 196, 400, 4096, 12544])
@pytest.mark.parametrize('width', [1, 256, 5120, 40960, 10**7])
def test_plan_covers_the_tokens_without_a_wasted_block(length, width):
    blocks, steps, chunks = torch_backend.make_plan(length, width)
    assert blocks * steps * chunks >= length > (blocks - 1) * steps * chunks
    assert steps * chunks == 1 or steps * chunks * width <= 2 * torch_backend._BLOCK


def test_last_state_continues_a_sequence():
    """Scanning the second half from the first half's state equals scanning the whole."""
    inputs = make_inputs(skip=False, length=20)
    whole, _ = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    cut = 13
    halves = [{name: x if name in ('A', 'delta_bias') else x[..., part] for name, x in
               inputs.items()} for part in (slice(None, cut), slice(cut, None))]
    first, state = selective_scan(**halves[0], delta_softplus=True, return_last_state=True)
    second = selective_scan(**halves[1], delta_softplus=True)
    step = torch.nn.functional.softplus(halves[1]['delta'] + inputs['delta_bias'][:, None])
    fade = torch.exp(step.cumsum(-1)[..., None] * inputs['A'][:, None])  # (B, D, L, N)
    second = second + torch.einsum('bdln,bdn,bnl->bdl', fade, state, halves[1]['C'])
    torch.testing.assert_close(torch.cat([first, second], -1), whole)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_reverse_is_the_scan_of_the_flipped_sequence(backend):
    inputs = make_inputs()
    flipped = {k: x.flip(-1) if x.dim() == 3 else x for k, x in inputs.items()}
    settings = {'delta_softplus': True, 'return_last_state': True, 'backend': backend}
    y, last = selective_scan(**inputs, reverse=True, **settings)
    y_flipped, last_flipped = selective_scan(**flipped, **settings)
    torch.testing.assert_close(y, y_flipped.flip(-1))
    torch.testing.assert_close(last, last_flipped)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_softplus_is_the_identity_above_20(backend):
    inputs = make_inputs(1, 2, 4, 1, skip=False, bias=False)
    inputs['delta'] = torch.tensor([[[19.5, 20.5, 25.0, 1000.0]] * 2], dtype=torch.float64)
    inputs['A'] = torch.full((2, 1), -1e-3, dtype=torch.float64)
    with_softplus = run(inputs, backend=backend)
    inputs['delta'][..., 0] = torch.nn.functional.softplus(inputs['delta'][..., 0])
    plain = run(inputs, backend=backend, softplus=False)
    torch.testing.assert_close(with_softplus['y'], plain['y'], rtol=0, atol=1e-12)
    torch.testing.assert_close(with_softplus['grad_delta'][..., 1:], plain['grad_delta'][..., 1:])


@pytest.mark.parametrize('scale', [1e-6, 1.0, 50.0, 1e4])
def test_extreme_steps_stay_finite_and_right(scale):
    """Tiny steps keep a long memory; huge ones drive states through the denormals to zero."""
    inputs = make_inputs(1, 4, 700, 8, softplus=False, bias=False)
    inputs['delta'] = scale * torch.rand(1, 4, 700, dtype=torch.float64)
    expected = run(inputs, backend='reference', softplus=False)
    found = run({k: x.float() for k, x in inputs.items()}, backend='torch', softplus=False)
    assert all(x.isfinite().all() for x in found.values())
    assert_same(found, expected, 2e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_half_precision_keeps_a_float32_state(backend, dtype):
    """As under autocast: activations in half precision, parameters in float32."""
    inputs = make_inputs(1, 8, 300, gate=True)
    for name in ('u', 'delta', 'B', 'C', 'z'):
        inputs[name] = inputs[name].to(dtype)
    for name in ('A', 'D', 'delta_bias'):
        inputs[name] = inputs[name].float()
    expected = run({k: x.double() for k, x in inputs.items()}, backend='reference')
    found = run(inputs, backend=backend)
    assert found['y'].dtype == dtype and found['last_state'].dtype == torch.float32
    for name, x in inputs.items():
        assert found[f'grad_{name}'].dtype == x.dtype
    assert_same(found, expected, 2 * torch.finfo(dtype).eps)
    assert_same({'s': found['last_state']}, {'s': expected['last_state']}, 1e-5)


def test_autocast_does_not_lower_the_state():
    inputs = make_inputs(1, 8, 300, dtype=torch.float32)
    expected = run(inputs, backend='torch')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = run(inputs, backend='torch')
    assert_same(found, expected, 0)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_any_strides(backend):
    inputs = make_inputs(gate=True)
    inputs['B'] = inputs['B'][:, :, :1].expand_as(inputs['B'])
    expected = run({k: x.contiguous() for k, x in inputs.items()}, backend=backend)
    strided = {
        k: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], 1)[:, 0]
        for k, x in inputs.items()
    }
    strided['u'] = torch.cat([inputs['u'], inputs['u']], 1)[:, D:]
    strided['B'] = inputs['B']
    assert not any(x.is_contiguous() for x in strided.values())
    leaves = {k: x.requires_grad_() for k, x in strided.items()}
    y = selective_scan(**leaves, delta_softplus=True, backend=backend)
    assert y.is_contiguous()
    torch.testing.assert_close(y.detach(), expected['y'])
    y.sum().backward()
    for name, x in leaves.items():
        contiguous = {k: v.detach().contiguous() for k, v in leaves.items()}
        contiguous[name].requires_grad_()
        selective_scan(**contiguous, delta_softplus=True, backend=backend).sum().backward()
        torch.testing.assert_close(x.grad, contiguous[name].grad, msg=name)


@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
@pytest.mark.parametrize('batch, length', [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_scan(batch, length, backend):
    inputs = make_inputs(batch, length=length, gate=True, dtype=torch.float32)
    inputs = {k: x.requires_grad_() for k, x in inputs.items()}
    y, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert y.shape == (batch, D, length)
    assert last.shape == (batch, D, N) and not last.any()
    y.sum().backward()
    assert inputs['u'].grad.shape == inputs['u'].shape


def test_second_derivative_is_refused_clearly():
    inputs = {k: x.requires_grad_() for k, x in make_inputs().items()}
    y = selective_scan(**inputs, delta_softplus=True, backend='torch')
    (grad,) = torch.autograd.grad((y**2).sum(), inputs['u'], create_graph=True)
    with pytest.raises(RuntimeError, match="only once.*backend='reference'"):
        grad.sum().backward()
    y = selective_scan(**inputs, delta_softplus=True, backend='reference')
    (grad,) = torch.autograd.grad((y**2).sum(), inputs['u'], create_graph=True)
    grad.sum().backward()
    assert inputs['A'].grad.isfinite().all()


@pytest.mark.plain_empty
def test_operator_registration():
    inputs = make_inputs(1, 4, 30, gate=True, groups=1)
    inputs = {k: x.requires_grad_() for k, x in inputs.items()}
    order = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
    arguments = (*(inputs.get(name) for name in order), True, False)
    found = torch.library.opcheck(torch.ops.mmhybrid.selective_scan_torch.default, arguments)
    assert len(found) >= 4 and set(found.values()) == {'SUCCESS'}


@pytest.mark.plain_empty
@pytest.mark.parametrize('backend', ['torch', 'auto'])
def test_compiles_without_a_graph_break(backend):
    # In float64 `auto` passes a compiled kernel over, and would say so.
    inputs = make_inputs(1, 4, 30, gate=True)

    def scan(inputs):
        return selective_scan(**inputs, delta_softplus=True, backend=backend).sin()

    compiled = torch.compile(scan, backend='aot_eager', fullgraph=True)
    results = []
    for function in (scan, compiled):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        y = function(leaves)
        y.sum().backward()
        results.append({'y': y.detach()} | {k: x.grad for k, x in leaves.items()})
    assert_same(results[1], results[0], 1e-6)


def saved_bytes(length, backend):
    """Bytes that one call keeps for its backward pass, its inputs included once."""
    seen = {}

    def remember(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = make_inputs(1, 16, length, dtype=torch.float32)
    inputs = {k: x.requires_grad_() for k, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert y.requires_grad
    return sum(seen.values())


@pytest.mark.plain_empty
def test_saved_memory_is_linear_in_the_tokens():
    short, long = (saved_bytes(length, 'torch') for length in (2048, 8192))
    assert 3 < long / short < 5
    inputs_bytes = 4 * 8192 * (2 * 16 + 2 * N)
    assert long < 2 * inputs_bytes  # not the states, which would be N times one input


@pytest.mark.plain_empty
def test_number_of_operations_is_sublinear_in_the_tokens():
    def count(length):
        inputs = make_inputs(1, 16, length, dtype=torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            selective_scan(**inputs, delta_softplus=True, backend='torch')
        return sum(e.count for e in profile.key_averages() if e.key.startswith('aten::addcmul'))

    assert count(1024) < 1024 / 4
    assert count(4096) < 3 * count(1024)


GOLDEN_NAMES = ('y', 'grad_u', 'grad_delta', 'grad_A', 'grad_B', 'grad_C', 'grad_D',
                'grad_delta_bias')


@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
@pytest.mark.parametrize('case', ['scan_small', 'scan_no_D_no_bias', 'scan_softplus_threshold',
                                  'scan_long_2048'])
def test_published_scan(case, backend):
    """Stored results of the official model's scan, within ten times its own float32 noise."""
    manifest = json.loads((GOLDEN / 'manifest.json').read_text())
    noise = [entry['max_abs_f32_vs_f64'] for entry in manifest['cases'][case]['noise']]
    stored = {k: torch.from_numpy(x) for k, x in np.load(GOLDEN / f'{case}.npz').items()}
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
    inputs = {k: stored[k].clone().requires_grad_() for k in names if k in stored}
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    y.backward(stored['dy'])
    found = {'y': y.detach()} | {f'grad_{k}': x.grad for k, x in inputs.items()}
    present = [name for name in GOLDEN_NAMES if name in stored]
    assert len(present) == len(noise) == len(found)
    for name, limit in zip(present, noise, strict=True):
        error = (found[name] - stored[name]).abs().max().item()
        assert error <= 10 * limit, f'{name}: {error:.2e} > 10 * {limit:.2e}'


# Choice of the backend -------------------------------------------------------------------------


@pytest.fixture
def backends(monkeypatch):
    """The table of backends, which a test may change; and nothing was logged yet."""
    table = dict(scan_module._BACKENDS)
    monkeypatch.setattr(scan_module, '_BACKENDS', table)
    monkeypatch.delenv('MMHYBRID_SCAN_BACKEND', raising=False)
    scan_module._say_once.cache_clear()
    yield table
    scan_module._say_once.cache_clear()


def spy(table, name, calls):
    """Make a backend usable and note when it runs."""

    def run(*arguments):
        calls.append(name)
        return scan_module._run_reference(*arguments)

    table[name] = scan_module.Backend(run, *[lambda *_: None] * 3)


def broken(reason):
    return scan_module.Backend(None, lambda: reason, *[lambda *_: None] * 2)


def test_every_backend_is_reported():
    found = available_backends()
    assert set(found) == {'triton', 'mamba_ssm', 'cpp', 'torch', 'reference', 'export'}
    assert found['torch'].usable and found['reference'].usable
    for status in found.values():
        assert status.usable == (status.reason == '')


@pytest.mark.parametrize('wish', ['triton', 'mamba_ssm', 'cpp', 'torch', 'reference'])
def test_explicit_backend_is_the_one_that_runs(backends, wish):
    calls = []
    for name in tuple(backends):
        spy(backends, name, calls)
    selective_scan(**make_inputs(dtype=torch.float32), backend=wish)
    assert calls == [wish]


def test_auto_prefers_the_compiled_kernel_and_falls_back_once(backends, caplog):
    calls = []
    spy(backends, 'cpp', calls)
    spy(backends, 'torch', calls)
    selective_scan(**make_inputs(dtype=torch.float32))
    backends['cpp'] = broken('g++ is not installed')
    with caplog.at_level(logging.INFO, logger='mmhybrid'):
        selective_scan(**make_inputs(dtype=torch.float32))
        selective_scan(**make_inputs(dtype=torch.float32))
    assert calls == ['cpp', 'torch', 'torch']
    said = [r.getMessage() for r in caplog.records if 'falls back' in r.getMessage()]
    assert len(said) == 1
    assert "'torch'" in said[0] and 'g++ is not installed' in said[0]


def test_fallback_on_a_gpu_is_a_warning(backends, caplog):
    backends['triton'] = broken('Triton is too old')
    with caplog.at_level(logging.INFO, logger='mmhybrid'):
        assert choose_backend(device='cuda') == 'torch'
    assert [r.levelname for r in caplog.records] == ['WARNING']


def test_backend_may_refuse_a_call(backends):
    calls = []
    spy(backends, 'cpp', calls)
    refuse = lambda call: 'float64 is not compiled' if call.dtype == torch.float64 else None  # noqa: E731
    backends['cpp'] = backends['cpp']._replace(unsupported_reason=refuse)
    selective_scan(**make_inputs(dtype=torch.float64))
    assert calls == []
    with pytest.raises(RuntimeError, match="backend='cpp', but float64 is not compiled"):
        selective_scan(**make_inputs(dtype=torch.float64), backend='cpp')


def test_unavailable_wish_raises_with_the_reason(backends):
    backends['triton'] = broken("Triton is not installed; use backend='torch'")
    with pytest.raises(RuntimeError, match="asked for backend='triton', but Triton is not inst"):
        selective_scan(**make_inputs(), backend='triton')


def test_environment_variable_replaces_auto_only(backends, monkeypatch):
    calls = []
    for name in tuple(backends):
        spy(backends, name, calls)
    monkeypatch.setenv('MMHYBRID_SCAN_BACKEND', 'reference')
    selective_scan(**make_inputs())
    selective_scan(**make_inputs(), backend='torch')
    assert calls == ['reference', 'torch']
    monkeypatch.setenv('MMHYBRID_SCAN_BACKEND', 'fast')
    with pytest.raises(ValueError, match='MMHYBRID_SCAN_BACKEND=fast.*auto, triton'):
        selective_scan(**make_inputs())


@pytest.mark.parametrize(
    'change, error, message',
    [
        ({'backend': 'cuda'}, ValueError, "backend='cuda', which is no backend; choose one of"),
        ({'u': torch.zeros(2, D)}, ValueError, r'u of shape \(B, D, L\), got \(2, 12\)'),
        ({'delta': torch.zeros(B, D, L + 1)}, ValueError, r'delta of shape .* like u, got'),
        ({'A': torch.zeros(D + 1, N)}, ValueError, r'A of shape \(D, N\) with D = 12'),
        ({'A': torch.zeros(D, N, dtype=torch.complex64)}, TypeError, 'A of a real floating dtype'),
        ({'B': torch.zeros(D, N)}, ValueError, r'B of shape \(B, N, L\) = \(2, 8, 37\) or'),
        ({'C': torch.zeros(B, 2, N, L)}, ValueError, 'same number of groups, got 1 and 2'),
        ({'C': torch.zeros(B, 5, N, L)}, ValueError, 'divides D = 12, got G = 5'),
        ({'D': torch.zeros(D, 1)}, ValueError, r'D of shape \(D,\) = \(12,\)'),
        ({'delta_bias': torch.zeros(1)}, ValueError, r'delta_bias of shape'),
        ({'z': torch.zeros(B, D, 1)}, ValueError, r'z of shape .* like u'),
        ({'z': torch.zeros(B, D, L, device='meta')}, ValueError, r'u on cpu and z on meta'),
        ({'u': torch.zeros(B, D, L, dtype=torch.int64)}, TypeError, 'u of a real floating dtype'),
        ({'B': None}, TypeError, 'expects B as a tensor, got NoneType'),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    inputs = make_inputs(dtype=torch.float32)
    with pytest.raises(error, match=message):
        selective_scan(**{**inputs, **change})
