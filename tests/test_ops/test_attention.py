"""The compiled attention of a CPU against float64 and PyTorch's, and where it is not taken."""
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmhybrid.layers import Attention
from mmhybrid.ops.attention import attention, unsupported_reason

available = torch.no_grad()(unsupported_reason)(*[torch.ones(1, 1, 1, 8)] * 3) is None
needs_kernel = pytest.mark.skipif(not available, reason='no compiler, or short vectors')


def make(B, heads, queries, keys, D, spread=2.):
    """Views of one tensor (B, L, 3, heads, D), as a linear layer gives them."""
    both = spread * torch.randn(B, max(queries, keys), 3, heads, D)
    q, k, v = (x.transpose(1, 2) for x in both.unbind(2))
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def exact(q, k, v):
    q, k, v = (x.double() for x in (q, k, v))
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v


@needs_kernel
@pytest.mark.parametrize('sizes', [
    (1, 1, 1, 1, 8), (2, 3, 7, 50, 16), (2, 3, 100, 97, 40), (1, 2, 70, 800, 48),
    (1, 2, 9, 384, 24), (2, 2, 64, 385, 64), (1, 1, 65, 400, 80), (2, 2, 33, 70, 56),
    (1, 2, 130, 129, 32), (3, 1, 5, 1200, 104), (1, 1, 12, 767, 128),
], ids=str)
@torch.no_grad()
def test_against_float64(sizes):
    q, k, v = make(*sizes)
    expected = exact(q, k, v)
    out = attention(q, k, v)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    noise = (F.scaled_dot_product_attention(q, k, v) - expected).abs().max()
    assert (out - expected).abs().max() <= 3 * noise + 1e-6


@needs_kernel
@torch.no_grad()
def test_number_of_threads_does_not_matter():
    q, k, v = make(1, 3, 200, 150, 40)
    expected, before = attention(q, k, v), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attention(q, k, v), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize('queries', [1, 20])
def test_large_infinite_and_missing_numbers(queries):
    """As PyTorch: large products decide, and what is no number stays none, in its rows alone."""
    q, k, v = make(1, 2, queries, 500, 16, spread=30.)
    torch.testing.assert_close(attention(q, k, v).double(), exact(q, k, v), rtol=1e-4, atol=1e-3)
    q, k, v = (x.clone() for x in make(1, 2, queries, 500, 16))
    q[0, 0, 0, 3] = float('nan')
    out = attention(q, k, v)
    assert out[0, 0, 0].isnan().all()
    assert out.isfinite().sum() == out.numel() - 16
    q[0, 0, 0, 3], k[0, 1, 400, 2] = 1., float('nan')
    out = attention(q, k, v)
    assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()
    k[0, 1] = k[0, 0]
    q[0, 0, 0], k[0, 0, :, 0], k[0, 0, 450, 0] = 0., -float('inf'), 1.
    q[0, 0, 0, 0] = 1.  # all products but one, in the second block of keys, are minus infinity
    torch.testing.assert_close(attention(q, k, v)[0, 0, 0], v[0, 0, 450])


@needs_kernel
def test_layer_takes_it_in_inference_only(monkeypatch):
    from mmhybrid.layers import attention as source
    calls = []
    monkeypatch.setattr(source, 'attention', lambda *x: calls.append(1) or attention(*x))
    layer, x = Attention(32, 2), torch.randn(2, 30, 32)
    wanted = layer(x).detach()
    assert not calls
    for context in (torch.no_grad, torch.inference_mode):
        calls.clear()
        with context():
            torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
            assert calls
            few = layer(x, lambda t: t[:, 3:7])
            torch.testing.assert_close(few, wanted[:, 3:7], rtol=1e-5, atol=1e-5)
    calls.clear()
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64
        layer.float()
        with torch.autocast('cpu', torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.compile(layer, backend='eager', fullgraph=True)(x)
        torch.jit.trace(layer, x, check_trace=False)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        with FakeTensorMode():
            Attention(32, 2)(torch.empty(2, 30, 32))
        Attention(18, 2)(torch.randn(1, 5, 18))
        assert layer(x[:0]).shape == (0, 30, 32)
    assert not calls


def test_without_a_kernel_it_is_pytorchs(monkeypatch):
    from mmhybrid.ops import attention as source
    monkeypatch.setattr(source, '_library', lambda: 'no compiler')
    with torch.no_grad():
        assert unsupported_reason(*make(1, 1, 3, 3, 8)) == 'no compiler'
        assert Attention(16, 2)(torch.randn(1, 3, 16)).shape == (1, 3, 16)
