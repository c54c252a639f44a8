"""The scan by mamba_ssm's kernels: what they are handed, with a stand-in; themselves on a GPU."""

import importlib
import sys
from types import SimpleNamespace

import mamba_ssm_stand_in as stand_in
import pytest
import torch
from scan_cases import CASES, assert_same, make_inputs, run

from mmhybrid.ops import available_backends, selective_scan, selective_scan_ordered
from mmhybrid.ops.selective_scan import choose_backend, mamba_ssm_backend

scan_module = importlib.import_module('mmhybrid.ops.selective_scan')
TOKENS = ('u', 'delta', 'B', 'C', 'z')


@pytest.fixture
def installed(monkeypatch):
    """The stand-in in place of the compiled module, and CPU tensors in place of a GPU's."""
    table = dict(scan_module._BACKENDS)
    table['mamba_ssm'] = table['mamba_ssm']._replace(unsupported_reason=lambda call: None)
    monkeypatch.setattr(scan_module, '_BACKENDS', table)
    monkeypatch.setattr(mamba_ssm_backend, '_extension', lambda: stand_in)
    monkeypatch.delenv('MMHYBRID_SCAN_BACKEND', raising=False)
    scan_module._say_once.cache_clear()
    stand_in.calls.clear()
    yield table
    scan_module._say_once.cache_clear()


def to_float(inputs):
    return {name: x.float() for name, x in inputs.items()}


@pytest.mark.parametrize('use_state', [True, False])
@pytest.mark.parametrize('case', [
    pytest.param(case, marks=[pytest.mark.slow] if case[2] == 1000 else []) for case in CASES
], ids=lambda case: '-'.join(map(str, case)))
def test_equals_the_reference(installed, case, use_state):
    """With a gradient of the last state, which the kernels do not know, and without."""
    *sizes, skip, gate, bias, softplus, reverse = case
    inputs = make_inputs(*sizes, skip=skip, gate=gate, bias=bias, softplus=softplus)
    settings = {'softplus': softplus, 'reverse': reverse, 'use_state': use_state}
    expected = run(inputs, backend='reference', **settings)
    found = run(to_float(inputs), backend='mamba_ssm', **settings)
    assert_same(found, expected, 2e-5)
    length = sizes[2]
    added = [('fwd', torch.float32, length + sizes[3]), ('bwd', torch.float32, length + sizes[3])]
    plain = [('bwd', torch.float32, length)]
    assert stand_in.calls == [('fwd', torch.float32, length), *(added if use_state else plain)]


@pytest.mark.parametrize('chunk, length', [
    (16, 32), (16, 33), pytest.param(2048, 2049, marks=pytest.mark.slow)
])
def test_states_of_several_chunks(installed, monkeypatch, chunk, length):
    assert stand_in.CHUNK == mamba_ssm_backend._CHUNK == 2048
    monkeypatch.setattr(stand_in, 'CHUNK', chunk)
    monkeypatch.setattr(mamba_ssm_backend, '_CHUNK', chunk)
    inputs = make_inputs(1, 4, length, 2, gate=True)
    expected = run(inputs, backend='reference')
    assert_same(run(to_float(inputs), backend='mamba_ssm'), expected, 2e-5)


def test_gradient_of_the_last_state_alone(installed):
    inputs = make_inputs(gate=True)
    expected = run(inputs, backend='reference', use_y=False)
    for name in ('grad_C', 'grad_D', 'grad_z'):  # the state does not depend on these
        expected[name] = torch.zeros_like(inputs[name.removeprefix('grad_')])
    assert_same(run(to_float(inputs), backend='mamba_ssm', use_y=False), expected, 2e-5)


@pytest.mark.parametrize('use_state', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(installed, dtype, use_state):
    inputs = make_inputs(1, 8, 300, gate=True)
    inputs = {k: x.to(dtype) if k in TOKENS else x.float() for k, x in inputs.items()}
    expected = run(
        {k: x.double() for k, x in inputs.items()}, backend='reference', use_state=use_state
    )
    found = run(inputs, backend='mamba_ssm', use_state=use_state)
    assert found['y'].dtype == dtype and found['last_state'].dtype == torch.float32
    for name, x in inputs.items():
        assert found[f'grad_{name}'].dtype == x.dtype
    assert_same(found, expected, 4 * torch.finfo(dtype).eps)
    assert_same({'s': found['last_state']}, {'s': expected['last_state']}, 1e-5)
    assert stand_in.calls[0] == ('fwd', dtype, 300)


@pytest.mark.parametrize('mixed, computed', [
    ({'u': torch.bfloat16}, torch.float32),
    ({'u': torch.bfloat16, 'delta': torch.float16, 'B': torch.bfloat16, 'C': torch.bfloat16,
      'z': torch.bfloat16}, torch.float32),
    ({'A': torch.bfloat16, 'D': torch.float16, 'delta_bias': torch.bfloat16}, torch.float32),
])
def test_mixed_dtypes_lose_nothing(installed, mixed, computed):
    inputs = to_float(make_inputs(gate=True))
    inputs |= {name: inputs[name].to(dtype) for name, dtype in mixed.items()}
    expected = run({k: x.double() for k, x in inputs.items()}, backend='reference')
    found = run(inputs, backend='mamba_ssm')
    assert stand_in.calls[0][1] == computed and found['y'].dtype == inputs['u'].dtype
    for name, x in inputs.items():
        assert found[f'grad_{name}'].dtype == x.dtype
    coarsest = max(torch.finfo(x.dtype).eps for x in inputs.values())
    assert_same(found, expected, 2 * coarsest)


@pytest.mark.parametrize('length', [1, 37, 128])
@pytest.mark.parametrize('reverse', [False, True])
def test_any_strides(installed, length, reverse):
    """Token-major, expanded, cut out of larger tensors at odd places: the stand-in is strict."""
    inputs = to_float(make_inputs(2, 12, length, groups=2, gate=True))
    inputs['B'] = inputs['B'][:, :1].expand_as(inputs['B'])
    expected = run({k: x.double() for k, x in inputs.items()}, backend='reference',
                   reverse=reverse)
    strided = {k: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], 1)[:, 0]
               for k, x in inputs.items()}
    strided['u'] = torch.cat([inputs['u'][..., :1], inputs['u']], -1)[..., 1:]  # 4 bytes off
    strided['C'] = torch.cat([inputs['C'][:, :, :3], inputs['C']], 2)[:, :, 3:]
    strided['B'] = inputs['B']
    leaves = {k: x.detach().requires_grad_() for k, x in strided.items()}
    y, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True,
                             reverse=reverse, backend='mamba_ssm')
    assert y.is_contiguous()
    assert_same({'y': y, 'last': last},
                {'y': expected['y'], 'last': expected['last_state']}, 2e-5)
    y.sum().backward()  # its gradient has no stride at all
    plain = {k: x.detach().double().requires_grad_() for k, x in inputs.items()}
    selective_scan(**plain, delta_softplus=True, reverse=reverse,
                   backend='reference').sum().backward()
    assert_same({k: x.grad for k, x in leaves.items()}, {k: x.grad for k, x in plain.items()}, 2e-5)


@pytest.mark.parametrize('reverse', [False, True])
def test_orders_are_copies(installed, reverse):
    inputs = make_inputs(2, 8, 12, 4, groups=2, gate=True)
    shaped = {k: x.unflatten(1, (2, 4)) if k in ('u', 'delta', 'z') else x
              for k, x in inputs.items()}
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    order = torch.cat([order[:, :5], torch.full((2, 2), -1), order[:, 5:]], 1)  # two empty places
    results = []
    for backend, dtype in (('reference', torch.float64), ('mamba_ssm', torch.float32)):
        leaves = {k: x.to(dtype).detach().requires_grad_() for k, x in shaped.items()}
        y, last = selective_scan_ordered(**leaves, delta_softplus=True, return_last_state=True,
                                         order=order, reverse=reverse, backend=backend)
        (y.square().sum() + last.sum()).backward()
        results.append({'y': y.detach(), 'last': last.detach()}
                       | {k: x.grad for k, x in leaves.items()})
    assert_same(results[1], results[0], 2e-5)


def test_autocast_and_nothing_to_scan(installed):
    inputs = to_float(make_inputs())
    expected = run(inputs, backend='mamba_ssm')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert_same(run(inputs, backend='mamba_ssm'), expected, 0)
    empty = to_float(make_inputs(2, length=0, gate=True))
    y, last = selective_scan(**empty, return_last_state=True, backend='mamba_ssm')
    assert y.shape == (2, 12, 0) and not last.any()


def test_second_derivative_is_refused(installed):
    inputs = {k: x.requires_grad_() for k, x in to_float(make_inputs()).items()}
    y = selective_scan(**inputs, delta_softplus=True, backend='mamba_ssm')
    (grad,) = torch.autograd.grad((y**2).sum(), inputs['u'], create_graph=True)
    with pytest.raises(RuntimeError, match="only once.*backend='reference'"):
        grad.sum().backward()


@pytest.mark.plain_empty
@pytest.mark.parametrize('gate, dtype', [(False, torch.float32), (True, torch.bfloat16)])
def test_operator_registration(installed, gate, dtype):
    inputs = make_inputs(1, 4, 30, gate=gate, groups=1)
    inputs = {k: x.to(dtype if k in TOKENS else torch.float32).requires_grad_()
              for k, x in inputs.items()}
    order = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
    arguments = (*(inputs.get(name) for name in order), True, False)
    found = torch.library.opcheck(torch.ops.mmhybrid.selective_scan_mamba_ssm.default, arguments)
    assert len(found) >= 4 and set(found.values()) == {'SUCCESS'}


@pytest.mark.plain_empty
def test_compiles_without_a_graph_break(installed):
    inputs = to_float(make_inputs(1, 4, 30, gate=True))

    def scan(inputs):
        return selective_scan(**inputs, delta_softplus=True, reverse=True,
                              backend='mamba_ssm').sin()

    results = []
    for function in (scan, torch.compile(scan, backend='aot_eager', fullgraph=True)):
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        y = function(leaves)
        y.sum().backward()
        results.append({'y': y.detach()} | {k: x.grad for k, x in leaves.items()})
    assert_same(results[1], results[0], 1e-6)


# Choice -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is known yet of a module that the test may put in the place of the real one."""
    caches = mamba_ssm_backend._extension, mamba_ssm_backend._not_for_once
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'a GPU')
    monkeypatch.delenv('MMHYBRID_SCAN_BACKEND', raising=False)
    monkeypatch.setattr(mamba_ssm_backend, '_not_for', lambda index: None)
    for function in (*caches, scan_module._say_once):
        function.cache_clear()
    yield monkeypatch
    for function in (*caches, scan_module._say_once):
        function.cache_clear()


def without_triton(monkeypatch):
    table = dict(scan_module._BACKENDS)
    table['triton'] = table['triton']._replace(unavailable_reason=lambda: 'Triton is too old')
    monkeypatch.setattr(scan_module, '_BACKENDS', table)


def test_auto_takes_it_where_triton_cannot(fresh, caplog):
    fresh.setitem(sys.modules, 'selective_scan_cuda', stand_in)
    table = dict(scan_module._BACKENDS)
    table['triton'] = table['triton']._replace(
        unavailable_reason=lambda: None, unsupported_reason=lambda call: None
    )
    fresh.setattr(scan_module, '_BACKENDS', table)
    assert choose_backend('auto', 'cuda') == 'triton'
    without_triton(fresh)
    with caplog.at_level('INFO', logger='mmhybrid'):
        assert choose_backend('auto', 'cuda') == 'mamba_ssm'
    (record,) = [r for r in caplog.records if 'falls back' in r.getMessage()]
    assert record.levelname == 'INFO' and 'Triton is too old' in record.getMessage()
    assert choose_backend('auto', 'cuda', torch.float64) == 'torch'
    assert choose_backend('auto', 'cuda', state=257) == 'torch'
    assert choose_backend('auto', 'cuda', state=256) == 'mamba_ssm'
    assert choose_backend('auto', 'cpu') != 'mamba_ssm'
    assert available_backends()['mamba_ssm'].usable


@pytest.mark.parametrize('device, dtype, state, reason', [
    ('cpu', torch.float32, 8, "run on a GPU and the tensors are on 'cpu'"),
    ('cuda', torch.float64, 8, 'compute in float32, not torch.float64'),
    ('cuda', torch.float32, 257, 'at most 256 states and this call has 257'),
])
def test_what_it_does_not_take(fresh, device, dtype, state, reason):
    fresh.setitem(sys.modules, 'selective_scan_cuda', stand_in)
    with pytest.raises(RuntimeError, match=f"backend='mamba_ssm', but .*{reason}"):
        choose_backend('mamba_ssm', device, dtype, state)


def test_complex_parameters_are_refused(installed):
    inputs = to_float(make_inputs())
    with pytest.raises(TypeError, match='A of a real floating dtype'):
        selective_scan(**inputs | {'A': inputs['A'] + 0j}, backend='mamba_ssm')


def raising(error):
    """A finder of modules that meets an error in the one that we import."""

    def find_spec(name, path=None, target=None):
        if name == 'selective_scan_cuda':
            raise error

    return SimpleNamespace(find_spec=find_spec)


@pytest.mark.parametrize('error, reason', [
    (ModuleNotFoundError("No module named 'selective_scan_cuda'", name='selective_scan_cuda'),
     'not installed .*optional'),
    (ImportError('libc10_cuda.so: cannot open shared object file'),
     r'cannot be imported \(ImportError: libc10_cuda.so: .*built for torch \d'),
    (ImportError('undefined symbol: _ZN3c10\nmore'), r'undefined symbol: _ZN3c10\); it has'),
    (ModuleNotFoundError("No module named 'other'", name='other'), "No module named 'other'"),
])
def test_no_module(fresh, error, reason):
    fresh.delitem(sys.modules, 'selective_scan_cuda', raising=False)
    fresh.setattr(sys, 'meta_path', [raising(error), *sys.meta_path])
    without_triton(fresh)
    with pytest.raises(RuntimeError, match=f"backend='mamba_ssm', but mamba_ssm is .*{reason}"):
        choose_backend('mamba_ssm', 'cuda')
    assert choose_backend('auto', 'cuda') == 'torch'


def test_another_module_of_that_name(fresh):
    fresh.setitem(sys.modules, 'selective_scan_cuda', SimpleNamespace(fwd=stand_in.fwd))
    assert 'has no bwd, so it is not that of mamba_ssm' in mamba_ssm_backend.unavailable_reason()


def test_a_machine_without_a_gpu(fresh):
    fresh.setitem(sys.modules, 'selective_scan_cuda', stand_in)
    fresh.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'PyTorch sees no GPU' in available_backends()['mamba_ssm'].reason


def test_kernels_for_another_gpu(fresh):
    def fwd(*_):
        raise RuntimeError('CUDA error: no kernel image is available for execution\nmore')

    module = SimpleNamespace(fwd=fwd, bwd=fwd)
    fresh.setattr(mamba_ssm_backend, '_extension', lambda: module)
    zeros = torch.zeros
    fresh.setattr(torch, 'zeros', lambda *size, device: zeros(*size))
    reason = mamba_ssm_backend._not_for_once(3)
    assert 'does not run on a GPU (RuntimeError: CUDA error: no kernel image' in reason
    assert '\n' not in reason
    mamba_ssm_backend._not_for_once.cache_clear()
    fresh.setattr(mamba_ssm_backend, '_extension', lambda: stand_in)
    assert mamba_ssm_backend._not_for_once(3) is None


# The real one -------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('case', [*CASES, (2, 8, 128, 8, 2, True, True, True, True, True),
                                  (1, 4, 4096, 16, None, True, True, True, True, False)],
                         ids=lambda case: '-'.join(map(str, case)))
def test_the_real_one_on_a_gpu(case, dtype):
    if mamba_ssm_backend.unavailable_reason() is not None:
        pytest.skip(mamba_ssm_backend.unavailable_reason())
    *sizes, skip, gate, bias, softplus, reverse = case
    inputs = make_inputs(*sizes, skip=skip, gate=gate, bias=bias, softplus=softplus)
    inputs = {k: x.to(dtype if k in TOKENS else torch.float32) for k, x in inputs.items()}
    settings = {'softplus': softplus, 'reverse': reverse}
    for use_state in (True, False):
        expected = run({k: x.double() for k, x in inputs.items()}, backend='reference',
                       use_state=use_state, **settings)
        moved = {k: x.cuda() for k, x in inputs.items()}
        found = run(moved, backend='mamba_ssm', use_state=use_state, **settings)
        found = {k: None if x is None else x.cpu() for k, x in found.items()}
        assert_same(found, expected, max(2e-5, 4 * torch.finfo(dtype).eps))
