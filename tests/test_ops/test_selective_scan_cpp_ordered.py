"""The compiled CPU scan through tables: every order, sum over directions, expanded steps."""

import copy
from unittest import mock

import pytest
import torch

from mmhybrid.layers.direction_merge import ChannelAttention, merge_directions
from mmhybrid.layers.mixers.ss2d import SS2D, LocalSS2D
from mmhybrid.layers.mixers.vim import VimMixer
from mmhybrid.ops import selective_scan
from mmhybrid.ops.cross_scan import DIRECTIONS, cross_selective_scan, scan, scan_plan
from mmhybrid.ops.selective_scan import cpp
from mmhybrid.ops.selective_scan.ordered import selective_scan_ordered

REASON = cpp.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FOUR_WAYS = ('h', 'v', 'h_flip', 'v_flip')


@pytest.fixture
def threads(monkeypatch):
    """Set the number of threads, however small the work."""

    def choose(count):
        monkeypatch.setattr(cpp, '_WORK_PER_THREAD', 1)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: count)

    return choose


def make_inputs(groups, tokens, channels=20, state=5, gate=False, shared=False, batch=2):
    """Random inputs in float64; what is side by side in memory is not the same for all."""

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64)

    inputs = {
        'u': normal(batch, 1 if shared else groups, tokens, channels).mT,
        'delta': normal(batch, groups, channels, tokens) - 1,
        'A': -0.1 - torch.rand(groups * channels, state, dtype=torch.float64),
        'B': normal(batch, groups, tokens, state).mT,
        'C': normal(batch, groups, state, tokens),
        'D': normal(groups * channels),
        'delta_bias': normal(groups * channels),
    }
    if gate:
        inputs['z'] = normal(batch, groups, channels, tokens)
    return inputs


def run(scanned, inputs, dtype):
    """Outputs and gradients by name."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    y, last = scanned(**leaves)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for x in (y, last):
        loss = loss + (x * torch.randn(x.shape, generator=generator).to(x)).sum()
    grads = torch.autograd.grad(loss, [*leaves.values()])
    return {'y': y.detach(), 'last': last.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name].double() - want.double()).abs().max()
        scale = max(want.abs().max(), 1e-3)
        assert error <= tolerance * scale, f'{name}: error {error:.1e} at scale {scale:.1e}'


def ordered(backend, order, **settings):
    def scanned(**tensors):
        return selective_scan_ordered(
            **tensors, delta_softplus=True, return_last_state=True, order=order, backend=backend,
            **settings,
        )

    return scanned


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('size', [(1, 1), (7, 5), (9, 7), (13, 9)], ids=str)
@pytest.mark.parametrize('directions', [
    FOUR_WAYS, ('h', 'h_flip'), ('w2', 'w7_flip', 'v'), DIRECTIONS], ids='-'.join)
def test_orders_of_maps(directions, size, reverse):
    order = scan_plan(directions, *size).scan_order()
    inputs = make_inputs(len(directions), size[0] * size[1], gate=reverse)
    expected = run(ordered('reference', order, reverse=reverse), inputs, torch.float64)
    found = run(ordered('cpp', order, reverse=reverse), inputs, torch.float32)
    assert found['y'].dtype == found['last'].dtype == torch.float32
    assert_same(found, expected)


@pytest.mark.parametrize('length', [1, 31, 32, 63, 64, 1000])
@pytest.mark.parametrize(('channels', 'state'), [(1, 1), (15, 2), (16, 16), (33, 9)])
def test_any_permutation_of_odd_sizes(length, channels, state):
    order = torch.stack([torch.randperm(length), torch.randperm(length)])
    inputs = make_inputs(2, length, channels, state, batch=1)
    expected = run(ordered('reference', order), inputs, torch.float64)
    assert_same(run(ordered('cpp', order), inputs, torch.float32), expected)


@pytest.mark.parametrize('count', [1, 2, 3, 7, 64])
@pytest.mark.parametrize('merge', [False, True])
def test_steps_expanded_and_directions_summed_in_the_kernel(count, merge, threads):
    """One map in four ways; more threads than blocks of channels cut the tokens into chunks."""
    plan = scan_plan(('h', 'v_flip', 'w2', 'w7_flip'), 15, 11)
    inputs = make_inputs(4, 165, channels=40, shared=True, batch=1)
    inputs['delta'] = torch.randn(1, 4, 165, 3, dtype=torch.float64).mT
    inputs['weight'] = torch.randn(4, 40, 3, dtype=torch.float64)

    def compiled(weight, **tensors):
        names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
        u, delta, *rest = (tensors[name] for name in names)
        return cpp.scan_ordered(u, delta, weight, *rest, plan.scan_order(), True, merge)

    def plain(weight, u, delta, **tensors):
        y, last = ordered('reference', plan.scan_order())(
            u=u.expand(-1, 4, -1, -1), delta=weight @ delta, **tensors)
        return y.sum(1, keepdim=True) if merge else y, last

    expected = run(plain, inputs, torch.float64)
    threads(count)
    found = run(compiled, inputs, torch.float32)
    assert_same(found, expected)
    again = run(compiled, inputs, torch.float32)
    for name, x in found.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize('reverse', [False, True])
def test_without_a_table(reverse):
    inputs = make_inputs(1, 70, batch=3)

    def compiled(**tensors):
        names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
        u, delta, *rest = (tensors[name] for name in names)
        return cpp.scan_ordered(u, delta, None, *rest, None, True, False, reverse)

    expected = run(ordered('reference', torch.arange(70), reverse=reverse), inputs, torch.float64)
    assert_same(run(compiled, inputs, torch.float32), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype):
    order = scan_plan(FOUR_WAYS, 9, 7).scan_order()
    inputs = make_inputs(4, 63, gate=True)
    small = {name: x if name in ('A', 'D', 'delta_bias') else x.to(dtype)
             for name, x in inputs.items()}
    expected = run(ordered('reference', order), {k: x.double() for k, x in small.items()},
                   torch.float64)

    def scanned(**tensors):
        narrow = {name: x.to(small[name].dtype if name in ('u', 'delta', 'z', 'B', 'C')
                             else torch.float32) for name, x in tensors.items()}
        return ordered('cpp', order)(**narrow)

    found = run(scanned, small, torch.float32)
    assert found['y'].dtype == dtype and found['last'].dtype == torch.float32
    assert_same(found, expected, 4 * torch.finfo(dtype).eps)


def test_float64_goes_another_way():
    order = torch.randperm(12)
    inputs = make_inputs(1, 12)
    with pytest.raises(RuntimeError, match="float32, not torch.float64; use backend='torch'"):
        ordered('cpp', order)(**inputs)
    expected = run(ordered('reference', order), inputs, torch.float64)
    assert_same(run(ordered('auto', order), inputs, torch.float64), expected, 1e-9)


@pytest.mark.parametrize('merge', [False, True])
@pytest.mark.parametrize('restore', ['exact', 'released'])
@pytest.mark.parametrize('size', [(7, 5), (6, 6)], ids=str)
@pytest.mark.parametrize('directions', [FOUR_WAYS, DIRECTIONS, ('w2', 'v_flip')], ids='-'.join)
def test_scans_of_a_map(directions, size, restore, merge):
    K, L, D, N, R = len(directions), size[0] * size[1], 20, 3, 2
    inputs = dict(
        u=torch.randn(2, D, L), x_proj=torch.randn(K, R + 2 * N, D) / 4,
        dt_weight=torch.randn(K, D, R), A=-torch.rand(K * D, N) - 0.1, D=torch.randn(K * D),
        dt_bias=torch.randn(K * D))
    plan = scan_plan(directions, *size, restore=restore)

    def scanned(backend):
        def call(**tensors):
            y = cross_selective_scan(**tensors, plan=plan, merge=merge, backend=backend)
            y = y if merge else torch.cat(y, 1)
            return y, y

        return call

    expected = run(scanned('reference'), inputs, torch.float64)
    with mock.patch.object(scan, '_scan_copies', side_effect=AssertionError('copies')):
        found = run(scanned('cpp'), inputs, torch.float32)
    assert_same(found, expected)


@pytest.mark.parametrize('make', [
    lambda: (SS2D(16, channel_first=True), (2, 16, 3, 5)),
    lambda: (LocalSS2D(16, ('h', 'v', 'w2_flip')), (2, 3, 5, 16)),
    lambda: (VimMixer(12), (2, 15, 12), (3, 5))], ids=['SS2D', 'LocalSS2D', 'VimMixer'])
def test_mixers_take_the_kernel_and_train_as_with_the_reference(make, monkeypatch):
    mixer, shape, *rest = make()
    calls = mock.Mock(side_effect=cpp.scan_ordered)
    monkeypatch.setattr(cpp, 'scan_ordered', calls)

    def scanned(backend):
        def call(x, **weights):
            mixer.backend = backend
            y = torch.func.functional_call(mixer, weights, (x, *rest))
            return y, y

        return call

    inputs = {'x': torch.randn(shape), **{k: p.detach() for k, p in mixer.named_parameters()}}
    expected = run(scanned('reference'), inputs, torch.float64)
    assert not calls.called
    assert_same(run(scanned('auto'), inputs, torch.float32), expected, 1e-4)
    assert calls.called


def test_states_are_kept_for_a_backward_pass_only():
    order = scan_plan(FOUR_WAYS, 8, 8).scan_order()
    tensors = {k: x.float() for k, x in make_inputs(4, 64).items()}
    op = torch.ops.mmhybrid.selective_scan_cpp_ordered
    kept = []

    def watched(*args):
        found = op(*args)
        kept.append(found[2].numel())
        return found

    with mock.patch.object(torch.ops.mmhybrid, 'selective_scan_cpp_ordered', watched):
        scanned = ordered('cpp', order)
        y, last = scanned(**tensors)
        tensors['A'].requires_grad_()
        y_again, last_again = scanned(**tensors)
    assert kept[0] == 0 < kept[1]
    assert torch.equal(y, y_again) and torch.equal(last, last_again)


@pytest.mark.parametrize('wrong', [-2, 6, 2**31 - 1])
def test_a_table_that_points_elsewhere_is_refused(wrong):
    order = torch.tensor([0, 1, 2, 3, 4, 5, -1])
    inputs = {k: x.float() for k, x in make_inputs(1, 6).items()}
    assert ordered('cpp', order)(**inputs)[0].isfinite().all()
    order[3] = wrong
    with pytest.raises(ValueError, match=r'values from -1 to L - 1 = 5, got -?\d+ to \d+'):
        ordered('cpp', order)(**inputs)


def test_second_derivative_is_refused_clearly():
    inputs = {k: x.float().requires_grad_() for k, x in make_inputs(1, 6).items()}
    y, _ = ordered('cpp', torch.arange(6))(**inputs)
    (grad,) = torch.autograd.grad((y**2).sum(), inputs['u'], create_graph=True)
    with pytest.raises(RuntimeError, match='only once'):
        grad.sum().backward()


@pytest.mark.plain_empty
@pytest.mark.parametrize('expanded', [False, True])
def test_operator_registration(expanded):
    inputs = {k: x.float() for k, x in make_inputs(2, 9, shared=expanded).items()}
    weight = torch.randn(2, 20, 3) if expanded else None
    inputs['delta'] = torch.randn(2, 2, 3, 9) if expanded else inputs['delta']
    tensors = [inputs['u'], inputs['delta'], weight, *(
        inputs[name] for name in ('A', 'B', 'C', 'D', 'delta_bias'))]
    tensors = [x if x is None else x.requires_grad_() for x in tensors]
    order = torch.stack([torch.randperm(9)] * 2).int()
    found = torch.library.opcheck(
        torch.ops.mmhybrid.selective_scan_cpp_ordered.default,
        (*tensors, order, True, False, expanded, True))
    assert len(found) >= 4 and set(found.values()) == {'SUCCESS'}


@pytest.mark.parametrize(('K', 'D'), [(1, 1), (2, 15), (3, 16), (4, 40)])
@pytest.mark.parametrize('tokens', [1, 63, 200, 300])
def test_channel_attention_of_inference(tokens, K, D, monkeypatch):
    """Of results with a mean, with weights of the norm that are not as at the start."""
    attention = ChannelAttention(D, reduction=1)
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    ys = [10 + torch.randn(2, tokens, K, D).permute(0, 2, 3, 1)]
    expected = merge_directions([y.double() for y in ys], copy.deepcopy(attention).double())
    called = mock.Mock(side_effect=cpp.scaled_sum)
    monkeypatch.setattr(cpp, 'scaled_sum', called)
    with torch.no_grad():
        found = merge_directions(ys, attention, compiled=True)
    assert called.call_count == 1
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-3)
    merge_directions(ys, attention, compiled=True)[0, 0, 0].backward()  # there with gradients
    with torch.no_grad():
        attention.register_forward_hook(lambda *_: None)
        merge_directions(ys, attention, compiled=True)
    assert called.call_count == 1


@pytest.mark.plain_empty
def test_one_compilation_serves_every_length():
    """Of both public functions: no check makes a length a constant."""
    graphs = []

    def look(graph, example_inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=look, fullgraph=True, dynamic=True)
    def plain(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True)

    for length in (30, 47, 100):
        u, delta = torch.randn(1, 4, length), torch.randn(1, 4, length)
        A, B, C = -torch.ones(4, 2), torch.randn(1, 2, length), torch.randn(1, 2, length)
        torch.testing.assert_close(
            plain(u, delta, A, B, C), selective_scan(u, delta, A, B, C, delta_softplus=True))
    assert len(graphs) == 1
