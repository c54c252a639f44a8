"""Direct launches on a GPU: they give the bits of Triton's ordinary launches, and are taken."""

import gc

import pytest
import torch

from mmhybrid.ops import selective_scan, triton_support
from mmhybrid.ops.selective_scan import launch, triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
    pytest.mark.skipif(
        triton_support.unavailable_reason() is not None or triton_support.interpreting(),
        reason='needs Triton',
    ),
]


@pytest.fixture(autouse=True)
def nothing_known():
    triton_backend.forget()
    yield
    triton_backend.forget()


def inputs(batch=2, channels=80, length=300, state=8, dtype=torch.bfloat16, shift=0, device=0):
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        memory = torch.randn(batch * length * n + shift, generator=generator).to(device, dtype)
        return memory[shift:].view(batch, length, n).mT

    A, D, bias = (
        torch.rand(shape, generator=generator).to(device)
        for shape in ((channels, state), (channels,), (channels,))
    )
    given = [tokens(channels), tokens(channels), -A, tokens(state), tokens(state), D]
    return [x.requires_grad_() for x in (*given, tokens(channels), bias)]


def both_passes(given):
    y, last = selective_scan(*given, True, True, backend='triton')
    grads = torch.autograd.grad(y.float().sum() + last.sum(), given)
    return [y.detach(), last.detach(), *grads]


def ordinary(given, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv('MMHYBRID_DIRECT_LAUNCH', '0')
        triton_backend.forget()
        found = both_passes(given)
    triton_backend.forget()
    return found


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def launches(monkeypatch):
    """Which programs were launched directly."""
    seen, direct = [], launch.Program._direct

    def noted(self, pointers):
        seen.append(direct(self, pointers))
        return seen[-1]

    monkeypatch.setattr(launch.Program, '_direct', noted)
    return seen


@pytest.mark.parametrize('shape', [
    dict(), dict(length=8, batch=64), dict(channels=1), dict(state=1), dict(shift=1),
    dict(dtype=torch.float32), dict(dtype=torch.float16, state=3),
], ids=str)
def test_the_same_bits(shape, launches, monkeypatch):
    given = inputs(**shape)
    expected = ordinary(given, monkeypatch)
    for _ in range(4):
        assert same(both_passes(given), expected)
    assert launches == [True] * 4  # both passes, the third and the fourth time


def test_another_stream(launches, monkeypatch):
    given = inputs()
    expected = ordinary(given, monkeypatch)
    for _ in range(2):
        both_passes(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [x.detach().clone().requires_grad_() for x in given]
        late = [x.detach().add_(0).requires_grad_() for x in late]
        found = both_passes(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(found, expected) and launches and all(launches)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_another_current_device(launches, monkeypatch):
    given = inputs(device=1)
    expected = ordinary(given, monkeypatch)
    for _ in range(4):
        assert same(both_passes(given), expected)
    assert len(launches) >= 4 and all(launches) and torch.cuda.current_device() == 0


def test_a_graph_of_both_passes(launches, monkeypatch):
    given = inputs()
    expected = ordinary(given, monkeypatch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both_passes(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both_passes(given)
    for x in found:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, expected) and launches and all(launches)


def test_memory_goes_back(launches):
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    given = inputs()
    for _ in range(4):
        both_passes(given)
    del given
    gc.collect()
    assert launches and torch.cuda.memory_allocated() == before
