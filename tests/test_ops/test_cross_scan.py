"""Order tables, the way there and back, and the scan over all directions."""
import contextlib
import gc
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from mmhybrid.layers.mixers import directional, ss2d
from mmhybrid.layers.mixers.localvim import LocalVimMixer
from mmhybrid.layers.mixers.ss2d import SS2D, LocalSS2D
from mmhybrid.layers.mixers.vim import VimMixer
from mmhybrid.ops.cross_scan import (
    DIRECTIONS,
    cross_merge,
    cross_restore,
    cross_scan,
    cross_selective_scan,
    orders,
    scan,
    scan_plan,
)
from mmhybrid.ops.cross_scan.orders import _MAX_CACHED_TABLES, _PLANS, _TABLES
from mmhybrid.ops.cross_scan.reference import order_reference, restore_reference
from mmhybrid.ops.selective_scan import choose_backend, ordered
from mmhybrid.ops.selective_scan.ordered import selective_scan_ordered
from mmhybrid.ops.selective_scan.reference import selective_scan_reference

DATA = Path(__file__).parents[1] / 'data'
SIZES = [(1, 1), (1, 5), (5, 1), (5, 7), (6, 10), (7, 7), (9, 13), (14, 14)]
NAMES = (*DIRECTIONS, 'w3', 'w5_flip', 'w10')


def order_along(plan, k):
    order = plan.order_of(k).order.tolist()
    return order[::-1] if plan.reverse[k] else order


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_orders_follow_the_definition(size):
    plan = scan_plan(NAMES, *size)
    for k, name in enumerate(NAMES):
        assert order_along(plan, k) == order_reference(name, *size), name
        order = plan.order_of(k)
        assert order.order.dtype == order.restored_from.dtype == torch.int32
        assert order.length == order.order.numel() and order.exact
        positions = order.restored_from.tolist()
        if plan.reverse[k]:
            positions = [order.length - 1 - p for p in positions]
        assert positions == restore_reference(name, *size), name


@pytest.mark.parametrize('size', ['5x7', '6x10', '14x14'])
def test_released_tables_of_localmamba(size):
    golden = np.load(DATA / 'localmamba' / 'scan_index.npz')
    height, width = map(int, size.split('x'))
    for restore, kind in (('exact', 'correct'), ('released', 'official')):
        plan = scan_plan(DIRECTIONS, height, width, restore=restore)
        for k, name in enumerate(DIRECTIONS):
            order = plan.order_of(k)
            assert order_along(plan, k) == golden[f'{size}/{name}/scan'].tolist(), name
            # Positions count along the direction, which for a flip is the order from its end.
            positions = order.restored_from
            positions = order.length - 1 - positions if plan.reverse[k] else positions
            assert positions.tolist() == golden[f'{size}/{name}/restore_{kind}'].tolist(), name


@pytest.mark.parametrize('size', ['5x7', '6x10', '14x14'])
def test_released_tables_of_vmamba(size):
    golden = np.load(DATA / 'vmamba' / 'ss2d_only.npz')[f'cross_scan_index/{size}']
    plan = scan_plan(('h', 'v', 'h_flip', 'v_flip'), *map(int, size.split('x')))
    assert [order_along(plan, k) for k in range(4)] == golden.tolist()


def test_flips_share_the_order_of_the_plain_direction():
    plan = scan_plan(DIRECTIONS, 6, 10)
    assert plan.order_ids == (0, 0, 1, 1, 2, 2, 3, 3)
    assert plan.reverse == (False, True) * 4
    x = torch.randn(2, 3, 60)
    assert plan.orders[0].take(x) is x  # `h` is the map itself: no copy


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_merge_undoes_scan(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    sequences = cross_scan(x, NAMES)
    for name, sequence in zip(NAMES, sequences, strict=True):
        index = torch.tensor(order_reference(name, *size))
        expected = x.flatten(2)[..., index.clamp_min(0)] * (index >= 0)
        assert torch.equal(sequence, expected), name
    for back in cross_restore(sequences, NAMES, *size):
        assert torch.equal(back, x)
    assert torch.equal(cross_merge(sequences[:4], NAMES[:4], *size), x * 4)


@pytest.mark.parametrize('restore', ['exact', 'released'])
def test_gradient_of_scan_and_merge(restore):
    names = ('h', 'v_flip', 'w2', 'w2_flip')
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn_like(s) for s in cross_scan(x.detach(), names)]

    def run(x):
        sequences = [s * w for s, w in zip(cross_scan(x, names), weights, strict=True)]
        return cross_merge(sequences, names, 3, 5, restore=restore)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def literal_scan(u, x_proj, dt_weight, A, D, dt_bias, directions, size, restore):
    """One direction after the other, zero tokens appended by hand, flips made by flipping."""
    K, channels, rank = dt_weight.shape
    N = A.shape[-1]
    proj = torch.stack([weight @ u for weight in x_proj], dim=1)
    results = []
    for k, name in enumerate(directions):
        index = torch.tensor(order_reference(name, *size))
        read = lambda t, index=index: t[..., index.clamp_min(0)] * (index >= 0)  # noqa: E731
        step, b, c = read(proj[:, k]).split([rank, N, N], dim=1)
        rows = slice(k * channels, (k + 1) * channels)
        y, _ = selective_scan_reference(
            read(u), dt_weight[k] @ step, A[rows], b[:, None], c[:, None], D[rows], None,
            dt_bias[rows], True, False)
        plain = name.removesuffix('_flip')
        y = y.flip(-1) if plain != name else y
        positions = torch.tensor(restore_reference(plain, *size))
        if plain == 'v' and restore == 'released':
            j = torch.arange(size[0] * size[1])
            positions = (j % size[0]) * size[1] + j // size[0]
        results.append(y[..., positions])
    return results


@pytest.mark.parametrize('way', ['reordered', 'through tables'])
@pytest.mark.parametrize('restore', ['exact', 'released'])
@pytest.mark.parametrize('directions', [
    ('h', 'v', 'h_flip', 'v_flip'), ('h', 'h_flip'), ('h_flip', 'v', 'w2', 'w7_flip'), ('v_flip',),
    DIRECTIONS], ids=lambda d: f'{len(d)}-{d[-1]}')
def test_cross_selective_scan_equals_one_scan_per_direction(directions, restore, way, monkeypatch):
    calls = []
    if way == 'through tables':  # what a backend that reads through tables is given

        def ordered(*args, backend, **kwargs):
            calls.append(kwargs['order'])
            return selective_scan_ordered(*args, backend='reference', **kwargs)

        monkeypatch.setattr(scan, 'choose_backend', lambda *_: 'triton')
        monkeypatch.setattr(scan, 'selective_scan_ordered', ordered)
    size, B, channels, N, R = (4, 5), 2, 3, 2, 2
    K, L = len(directions), size[0] * size[1]
    torch.manual_seed(K)
    inputs = dict(
        u=torch.randn(B, channels, L), x_proj=torch.randn(K, R + 2 * N, channels),
        dt_weight=torch.randn(K, channels, R), A=-torch.rand(K * channels, N) - 0.1,
        D=torch.randn(K * channels), dt_bias=torch.randn(K * channels))
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    plan = scan_plan(directions, *size, restore=restore)
    expected = literal_scan(*inputs.values(), directions, size, restore)
    stacks = cross_selective_scan(*inputs.values(), plan, merge=False)
    exact = all(order.exact for order in plan.orders)
    assert len(stacks) == (1 if way == 'through tables' and exact else K)
    for k, y in enumerate(torch.cat(stacks, 1).unbind(1)):
        torch.testing.assert_close(y, expected[k], msg=lambda m, k=k: f'{directions[k]}: {m}')
    merged = cross_selective_scan(*inputs.values(), plan)
    torch.testing.assert_close(merged, sum(expected))
    # One call for all directions, unmerged and merged, whatever their lengths.
    assert len(calls) == (2 if way == 'through tables' else 0)
    weight = torch.randn_like(merged)
    got = torch.autograd.grad((merged * weight).sum(), inputs.values())
    want = torch.autograd.grad((sum(expected) * weight).sum(), inputs.values())
    for name, g, w in zip(inputs, got, want, strict=True):
        torch.testing.assert_close(g, w, msg=lambda m, name=name: f'gradient of {name}: {m}')


def test_class_token_keeps_its_index_in_every_direction():
    height = width = 6
    token = 18
    plan = scan_plan(DIRECTIONS, height, width, class_token=token)
    assert plan.num_tokens == 37
    for k, name in enumerate(DIRECTIONS):
        read = order_along(plan, k)
        assert read.index(token) == token, name
        others = [t if t < token else t - 1 for t in read if t not in (token, -1)]
        assert others == [t for t in order_reference(name, height, width) if t >= 0], name
        x = torch.randn(2, 37)
        order = plan.order_of(k)
        assert torch.equal(order.restore(order.take(x)), x)


def test_tables_in_a_cuda_graph_are_never_freed(monkeypatch):
    """A graph keeps addresses, so what it reads must stay when the cache has moved on."""
    monkeypatch.setattr(orders, '_PLANS', OrderedDict())
    monkeypatch.setattr(orders, '_HELD_FOR_GRAPHS', {})
    monkeypatch.setattr(orders, '_MAX_CACHED_PLANS', 2)
    captured, other = (weakref.ref(scan_plan(('h', 'v'), 3, width)) for width in (5, 6))
    with monkeypatch.context() as patch:
        patch.setattr(orders, '_capturing', lambda table: True)
        scan_plan(('h', 'v'), 3, 5)
    for width in (7, 8):
        scan_plan(('h', 'v'), 3, width)
    gc.collect()
    assert captured() is not None and other() is None


def test_compiled_models_cache_tables_from_another_thread(monkeypatch):
    """The memory of this thread may belong to a CUDA graph, which takes it back."""
    threads, build = [], orders._tables

    def watched(*key):
        threads.append(threading.get_ident())
        return build(*key)

    stream = mock.Mock()
    monkeypatch.setattr(orders, '_TABLES', OrderedDict())
    monkeypatch.setattr(orders, '_tables', watched)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device', contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    like = SimpleNamespace(device=torch.device('cpu'), is_cuda=True)
    for _ in range(2):
        order, inverse = orders._copied_tables(like, 'v', 0, False, 2, 3, None)
        assert order.tolist() == [0, 3, 1, 4, 2, 5]
        assert inverse.tolist() == [0, 2, 4, 1, 3, 5]
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    stream.synchronize.assert_called_once_with()


def test_tables_are_cached_and_the_cache_is_bounded():
    first = scan_plan(('v', 'w7'), 9, 9).orders
    again = scan_plan(('w7', 'v_flip'), 9, 9).orders
    assert first[0].order is again[1].order and first[1].order is again[0].order
    assert scan_plan(('v', 'w7'), 9, 9).orders is first
    for height in range(2, _MAX_CACHED_TABLES + 12):
        scan_plan(('v',), height, 3)
    assert len(_TABLES) <= _MAX_CACHED_TABLES


def test_tables_made_in_inference_mode_serve_training():
    _TABLES.clear()
    _PLANS.clear()
    with torch.inference_mode():
        cross_scan(torch.randn(1, 1, 3, 4), ('v', 'w2'))
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    sum(s.sum() for s in cross_scan(x, ('v', 'w2'))).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_tables_made_on_the_meta_device_are_real():
    _TABLES.clear()
    _PLANS.clear()
    with torch.device('meta'):
        plan = scan_plan(('v', 'w2_flip'), 3, 3)
    assert plan.orders[1].order.tolist()[:5] == [0, 1, 3, 4, 2]
    assert scan_plan(('v',), 3, 3, 'meta').orders[0].take(torch.ones(2, 9, device='meta')).is_meta


def test_a_tracer_leaves_no_tables_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode
    _TABLES.clear()
    _PLANS.clear()
    with FakeTensorMode():
        shapes = [s.shape for s in cross_scan(torch.ones(1, 2, 3, 4), ('v', 'w2'))]
    assert shapes == [(1, 2, 12), (1, 2, 16)]
    x = torch.arange(12.).view(1, 1, 3, 4)
    assert cross_scan(x, ('v',))[0].flatten().tolist() == x.mT.flatten().tolist()


@pytest.mark.plain_empty
def test_operators():
    order = scan_plan(('v', 'w2'), 3, 5).orders[1]
    x = torch.randn(2, 3, 15, requires_grad=True)
    calls = [
        (torch.ops.mmhybrid.reorder, (x, order.order, order.inverse, True, False)),
        (torch.ops.mmhybrid.scan_tables, (torch.empty(0), 'w', 2, False, 3, 5, None)),
        (torch.ops.mmhybrid.scan_tables, (torch.empty(0), 'v', 0, True, 4, 4, 8))]
    for operator, arguments in calls:
        found = torch.library.opcheck(operator.default, arguments)
        assert len(found) >= 4 and set(found.values()) == {'SUCCESS'}


def test_a_permutation_has_an_index_for_every_zero_token():
    plan = scan_plan(('v_flip', 'w2', 'w7_flip'), 3, 5)
    orders, permutation = plan.scan_order(), plan.permutation()
    inverse = plan.inverse_permutation()
    assert orders.shape == permutation.shape == inverse.shape == (3, 49)
    assert orders.dtype == permutation.dtype == inverse.dtype == torch.int32
    for k, name in enumerate(plan.directions):
        order = order_reference(name, 3, 5)
        assert orders[k].tolist() == order + [-1] * (49 - len(order)), name
        assert sorted(permutation[k].tolist()) == list(range(49))
        tokens = orders[k] >= 0
        assert torch.equal(permutation[k][tokens], orders[k][tokens])
        assert torch.equal(permutation[k][inverse[k].long()], torch.arange(49, dtype=torch.int32))
    assert plan.scan_order() is orders and plan.permutation() is permutation  # made once


@pytest.mark.parametrize('make', [
    lambda backend: (SS2D(4, channel_first=True, backend=backend), (1, 4, 3, 5)),
    lambda backend: (LocalSS2D(8, ('h', 'v', 'w2_flip'), backend=backend), (1, 3, 5, 8)),
    lambda backend: (VimMixer(4, backend=backend), (1, 15, 4), (3, 5)),
    lambda backend: (LocalVimMixer(8, ('h', 'v', 'w2'), backend=backend), (1, 15, 8), (3, 5))],
    ids=['SS2D', 'LocalSS2D', 'VimMixer', 'LocalVimMixer'])
@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
def test_the_backend_is_chosen_once_per_call(make, backend, monkeypatch):
    chosen = []

    def choose(*args):
        chosen.append(args[0])
        return choose_backend(*args)

    for module in (scan, directional, ss2d):
        monkeypatch.setattr(module, 'choose_backend', choose)
    again = mock.Mock(side_effect=AssertionError('chosen for a second time'))
    monkeypatch.setattr(ordered, 'choose_backend', again)
    mixer, shape, *rest = make(backend)
    mixer(torch.randn(shape), *rest)
    assert chosen == [backend]


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: scan_plan(('h', 'diagonal'), 4, 4), "unknown scan direction 'diagonal'.*w7"),
    (lambda: scan_plan(('w0',), 4, 4), "unknown scan direction 'w0'"),
    (lambda: scan_plan((), 4, 4), 'at least one direction'),
    (lambda: scan_plan(('h',), 4, 4, restore='broken'), "'exact' or 'released', got 'broken'"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_plan_of_another_size_is_refused():
    plan = scan_plan(('h', 'v'), 3, 3)
    with pytest.raises(ValueError, match='12 tokens came with a plan for 2 directions and 9'):
        cross_selective_scan(torch.zeros(1, 2, 12), torch.zeros(2, 3, 2), torch.ones(2, 2, 1),
                             -torch.ones(4, 1), torch.ones(4), torch.ones(4), plan)
