"""The compiled CPU scan: its results, its threads, and how it is built or does without."""

import hashlib
import logging
import os
import platform
import threading
import time

import pytest
import torch
from scan_cases import CASES, B, D, L, assert_same, make_inputs, run

from mmhybrid.ops import available_backends, selective_scan
from mmhybrid.ops.selective_scan import choose_backend, cpp

REASON = cpp.unavailable_reason()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """An empty cache folder and no memory of a library; give the folder."""
    monkeypatch.setenv('MMHYBRID_CACHE', str(tmp_path / 'cache'))
    cpp._library.cache_clear()
    yield tmp_path / 'cache'
    cpp._library.cache_clear()


@pytest.fixture
def fake_compiler(monkeypatch, tmp_path):
    """Put a shell script in the compiler's place."""

    def write(commands):
        path = tmp_path / 'c++'
        path.write_text(f'#!/bin/sh\n{commands}\n')
        path.chmod(0o755)
        monkeypatch.setenv('CXX', str(path))

    return write


@pytest.fixture
def threads(monkeypatch):
    """Set the number of threads, however small the work."""

    def choose(count):
        monkeypatch.setattr(cpp, '_WORK_PER_THREAD', 1)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: count)

    return choose


def to_float(inputs):
    return {name: x.float() for name, x in inputs.items()}


@needs_kernel
@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(map(str, case)))
def test_kernel_equals_the_reference(case):
    *sizes, skip, gate, bias, softplus, reverse = case
    inputs = make_inputs(*sizes, skip=skip, gate=gate, bias=bias, softplus=softplus)
    settings = {'softplus': softplus, 'reverse': reverse}
    expected = run(inputs, backend='reference', **settings)
    found = run(to_float(inputs), backend='cpp', **settings)
    assert found['y'].dtype == found['last_state'].dtype == torch.float32
    assert_same(found, expected, 1e-5)


# Channels that fill no vector, one, and several; states of no, one and several whole parts.
@needs_kernel
@pytest.mark.parametrize('channels', [1, 15, 16, 17, 48])
@pytest.mark.parametrize('state', [1, 2, 3, 8, 9, 24])
def test_ragged_sizes(channels, state):
    inputs = make_inputs(1, channels, 45, state, gate=True)
    expected = run(inputs, backend='reference', reverse=True)
    assert_same(run(to_float(inputs), backend='cpp', reverse=True), expected, 1e-5)


@needs_kernel
@pytest.mark.parametrize('count', [2, 3, 7, 64])
def test_threads_chunks_and_splits(count, threads):
    """More threads than sequences: channels are split, then tokens cut into chunks."""
    inputs = make_inputs(1, 40, 333, gate=True)
    expected = run(inputs, backend='reference')
    threads(count)
    found = run(to_float(inputs), backend='cpp')
    assert_same(found, expected, 1e-5)
    again = run(to_float(inputs), backend='cpp')
    for name, x in found.items():
        assert torch.equal(x, again[name]), name


@needs_kernel
@pytest.mark.parametrize('count', [1, 16])
def test_long_sequence_keeps_its_accuracy(count, threads):
    inputs = make_inputs(1, 20, 12544, 8)
    expected = run(inputs, backend='torch')  # in float64
    threads(count)
    found = run(to_float(inputs), backend='cpp')
    for name, want in expected.items():
        error = (found[name].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < 1e-6, f'{name}: {error:.1e}'


@needs_kernel
@pytest.mark.parametrize('scale', [1e-6, 1.0, 50.0, 1e4])
def test_extreme_steps(scale):
    """From a memory longer than the sequence to states that fall through the denormals."""
    inputs = make_inputs(1, 20, 700, 8, softplus=False, bias=False)
    inputs['delta'] = scale * torch.rand(1, 20, 700, dtype=torch.float64)
    expected = run(inputs, backend='reference', softplus=False)
    found = run(to_float(inputs), backend='cpp', softplus=False)
    assert all(x.isfinite().all() for x in found.values())
    assert_same(found, expected, 1e-5)


@needs_kernel
def test_denormal_states_and_inputs():
    inputs = make_inputs(1, 16, 200, 8, softplus=False, bias=False, skip=False)
    inputs['delta'] = torch.full((1, 16, 200), 0.7, dtype=torch.float64)
    inputs['u'][..., 5:] = 0  # after that the state only fades: 1e-38 is reached and passed
    expected = run(inputs, backend='reference', softplus=False, use_state=False)
    found = run(to_float(inputs), backend='cpp', softplus=False, use_state=False)
    assert_same(found, expected, 1e-5)
    assert found['last_state'].abs().max() < 1e-6
    inputs['u'][:] = 1e-40
    y = selective_scan(**to_float(inputs), backend='cpp')
    assert y.isfinite().all() and y.abs().max() < 1e-36


@needs_kernel
def test_softplus_and_its_slope_are_accurate_everywhere():
    x = torch.linspace(-80, 80, 3200)
    leaf = x.clone().requires_grad_()
    # With one token per sequence, y is the step itself and its gradient the slope.
    shape = (3200, 1, 1)
    y = selective_scan(torch.ones(shape), leaf.reshape(shape), torch.zeros(1, 1), torch.ones(shape),
                       torch.ones(shape), delta_softplus=True, backend='cpp')
    y.sum().backward()
    step = torch.nn.functional.softplus(x.double(), threshold=1e9)
    assert (y.detach().double().view(-1) / step - 1).abs().max() < 5e-7
    assert (leaf.grad.double() / torch.sigmoid(x.double()) - 1).abs().max() < 5e-7


@needs_kernel
def test_growing_states_and_not_a_number():
    inputs = to_float(make_inputs(1, 20, 300, 8, softplus=False, bias=False))
    inputs['A'] = inputs['A'].abs() * 0.05
    assert_same(run(inputs, backend='cpp', softplus=False),
                run({k: x.double() for k, x in inputs.items()}, backend='reference',
                    softplus=False), 1e-4)
    inputs['A'] = inputs['A'] * 1e4  # overflows like the other backends
    assert not selective_scan(**inputs, backend='cpp')[..., -1].isfinite().any()
    inputs = to_float(make_inputs(1, 20, 300, 8))
    clean = selective_scan(**inputs, delta_softplus=True, backend='cpp')
    inputs['u'][0, 3, 100] = float('nan')
    y = selective_scan(**inputs, delta_softplus=True, backend='cpp')
    assert y[0, 3, 100:].isnan().all()
    y[0, 3, 100:] = clean[0, 3, 100:]
    assert torch.equal(y, clean)


@needs_kernel
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype):
    inputs = make_inputs(1, 8, 300, gate=True)
    for name, x in inputs.items():
        inputs[name] = x.float() if name in ('A', 'D', 'delta_bias') else x.to(dtype)
    expected = run({k: x.double() for k, x in inputs.items()}, backend='reference')
    found = run(inputs, backend='cpp')
    assert found['y'].dtype == dtype and found['last_state'].dtype == torch.float32
    assert all(found[f'grad_{name}'].dtype == x.dtype for name, x in inputs.items())
    assert_same(found, expected, 2 * torch.finfo(dtype).eps)


@needs_kernel
@pytest.mark.parametrize('reverse', [False, True])
def test_any_strides(reverse):
    inputs = to_float(make_inputs(2, 33, 70, groups=3))
    expected = run(inputs, backend='cpp', reverse=reverse)
    token_major = {k: x.mT.contiguous().mT if x.dim() > 1 else x for k, x in inputs.items()}
    token_major['u'] = torch.cat([token_major['u']] * 2, 1)[:, 33:]
    leaves = {k: x.requires_grad_() for k, x in token_major.items()}
    y, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True,
                             reverse=reverse, backend='cpp')
    assert torch.equal(y.detach(), expected['y'])
    assert torch.equal(last.detach(), expected['last_state'])
    (y.sum() + last.sum()).backward()  # a gradient without strides
    contiguous = {k: x.detach().clone().requires_grad_() for k, x in inputs.items()}
    y, last = selective_scan(**contiguous, delta_softplus=True, return_last_state=True,
                             reverse=reverse, backend='cpp')
    (y * torch.ones_like(y)).sum().backward(retain_graph=True)
    last.sum().backward()
    for name, x in leaves.items():
        torch.testing.assert_close(x.grad, contiguous[name].grad, msg=name)


@needs_kernel
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='the flags are those of x86-64')
@pytest.mark.parametrize('flags', [('-mavx2', '-mfma'), ('-fopenmp',)], ids=['AVX2', 'SSE'])
def test_other_vector_widths(flags, fresh_library, monkeypatch):
    if 'avx2' not in cpp._processor():
        pytest.skip('this processor has no AVX2')
    inputs = make_inputs(1, 19, 100, 9, groups=1, gate=True)
    expected = run(inputs, backend='reference')
    monkeypatch.setattr(cpp, '_attempts', lambda: [flags])
    assert cpp.unavailable_reason() is None
    assert cpp._library().mmhybrid_scan_lanes() == (8 if '-mavx2' in flags else 4)
    assert_same(run(to_float(inputs), backend='cpp'), expected, 1e-5)


@needs_kernel
@pytest.mark.plain_empty
def test_operator_registration():
    inputs = to_float(make_inputs(1, 4, 30, gate=True, groups=1))
    inputs = {k: x.requires_grad_() for k, x in inputs.items()}
    order = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
    arguments = (*(inputs.get(name) for name in order), True, False)
    found = torch.library.opcheck(torch.ops.mmhybrid.selective_scan_cpp.default, arguments)
    assert len(found) >= 4 and set(found.values()) == {'SUCCESS'}


@needs_kernel
@pytest.mark.plain_empty
def test_auto_takes_the_kernel_and_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.delenv('MMHYBRID_SCAN_BACKEND', raising=False)
    assert choose_backend() == 'cpp'
    inputs = to_float(make_inputs(1, 4, 30, gate=True))

    def scan(inputs):
        return selective_scan(**inputs, delta_softplus=True).sin()

    graphs = []

    def look(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph

    y = torch.compile(scan, backend=look, fullgraph=True)(inputs)
    torch.testing.assert_close(y, scan(inputs))
    assert len(graphs) == 1 and 'selective_scan_cpp' in graphs[0]


@needs_kernel
def test_second_derivative_is_refused_clearly():
    inputs = {k: x.requires_grad_() for k, x in to_float(make_inputs()).items()}
    y = selective_scan(**inputs, delta_softplus=True, backend='cpp')
    (grad,) = torch.autograd.grad((y**2).sum(), inputs['u'], create_graph=True)
    with pytest.raises(RuntimeError, match='only once'):
        grad.sum().backward()


@needs_kernel
@pytest.mark.plain_empty
def test_saved_memory_is_linear_in_the_tokens():
    def saved(length):
        seen = {}

        def remember(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = to_float(make_inputs(1, 16, length))
        inputs = {k: x.requires_grad_() for k, x in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            y = selective_scan(**inputs, delta_softplus=True, backend='cpp')
        assert y.requires_grad
        return sum(seen.values())

    assert 3.5 < saved(8192) / saved(2048) < 4.5
    assert saved(8192) < 1.5 * 4 * 8192 * (2 * 16 + 2 * 8)


# Building ---------------------------------------------------------------------------------------


def test_float64_and_other_devices_are_refused():
    inputs = make_inputs()
    if cpp.unavailable_reason() is None:
        with pytest.raises(RuntimeError, match="float32, not torch.float64; use backend='torch'"):
            selective_scan(**inputs, backend='cpp')
    assert choose_backend(dtype=torch.float64) == 'torch'
    assert choose_backend(device='meta') == 'torch'


def test_without_a_compiler_auto_goes_on(fresh_library, monkeypatch, caplog):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.delenv('MMHYBRID_SCAN_BACKEND', raising=False)
    status = available_backends()['cpp']
    assert not status.usable and "no C++ compiler ('no-such-compiler')" in status.reason
    with pytest.raises(RuntimeError, match="backend='cpp', but .*install g\\+\\+"):
        selective_scan(**make_inputs(), backend='cpp')
    with caplog.at_level(logging.WARNING):
        y = selective_scan(**to_float(make_inputs()))
    assert y.shape == (B, D, L)
    assert not caplog.records  # silently: nothing is wrong


def test_failing_compiler_is_reported(fresh_library, fake_compiler):
    fake_compiler('echo "fatal error: cstdint: No such file" >&2; exit 1')
    assert 'cstdint: No such file' in cpp.unavailable_reason()
    assert not list(fresh_library.glob('*.so'))


def test_unwritable_cache_is_reported(fresh_library, fake_compiler):
    fake_compiler('exit 0')
    fresh_library.write_text('a file where the folder should be')
    reason = cpp.unavailable_reason()
    assert 'cannot be written' in reason and 'MMHYBRID_CACHE' in reason


def test_several_processes_build_once(fresh_library, fake_compiler, monkeypatch):
    """Locks belong to the open file, so threads meet them as processes do."""
    fake_compiler('exit 0')
    builds = []

    def slow_compile(compiler, source, folder, stem):
        target = folder / f'{stem}-{hashlib.sha256(b"a library").hexdigest()}.so'
        builds.append(target)
        time.sleep(0.3)
        target.write_text('a library')
        return target

    monkeypatch.setattr(cpp, '_compile', slow_compile)
    paths = []
    workers = [threading.Thread(target=lambda: paths.append(cpp.build())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(builds) == 1 and len(set(paths)) == 1 and len(paths) == 4
    assert cpp.build() == paths[0] and len(builds) == 1


def test_library_is_kept_and_named_by_its_source(
    fresh_library, fake_compiler, monkeypatch, tmp_path
):
    fake_compiler('for last; do :; done; echo library > "$last"')
    first = cpp.build()
    assert [*fresh_library.glob('*.so')] == [first] and os.access(first, os.X_OK)
    assert cpp.build() == first
    source = tmp_path / 'scan.cpp'
    source.write_text(cpp._SOURCE.read_text() + '\n// another version\n')
    monkeypatch.setattr(cpp, '_SOURCE', source)
    assert cpp.build() != first
