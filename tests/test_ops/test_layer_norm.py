"""Sum and norm in one kernel: norm_cases.py, and what there is without kernels."""

from pathlib import Path

import pytest
import torch
from interpreter import run_cases
from torch import nn

from mmhybrid.layers import LayerNorm, LayerNorm2d, RMSNorm, add_norm
from mmhybrid.ops import layer_norm as ops

CASES = Path(__file__).with_name('norm_cases.py')


def test_kernels():
    assert run_cases(CASES, '-m', 'not slow') >= 80


@pytest.mark.slow
def test_kernels_slow():
    assert run_cases(CASES, '-m', 'slow') >= 70


# --- without kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(('ours', 'theirs', 'size'), [
    (LayerNorm, nn.LayerNorm, (2, 3, 12)), (RMSNorm, nn.RMSNorm, (2, 3, 12))])
@pytest.mark.parametrize('autocast', [False, True])
def test_a_cpu_has_the_bits_of_pytorch(autocast, ours, theirs, size, dtype):
    x = torch.randn(size).to(dtype)
    one, other = ours(12, feeds_linear=True), theirs(12, eps=1e-5)
    other.load_state_dict(one.state_dict())
    if dtype == torch.float64:
        one, other = one.double(), other.double()
    with torch.autocast('cpu', enabled=autocast):
        y, want = one(x), other(x)
        assert y.dtype == want.dtype and torch.equal(y, want)
        total, y = add_norm(x, x, one, torch.full((12,), 0.5))
        want = x + torch.full((12,), 0.5) * x
        assert total.dtype == want.dtype and torch.equal(total, want)
        assert torch.equal(y, other(want))


def test_why_not():
    x = torch.zeros(2, 3, 12)
    assert 'GPU' in ops.unsupported_reason(x) or 'Triton' in ops.unsupported_reason(x)
    assert 'meta' in ops.unsupported_reason(x.to('meta'))
    assert LayerNorm(12).to('meta')(x.to('meta')).is_meta


@pytest.mark.parametrize('norm', [LayerNorm(12), RMSNorm(12), LayerNorm2d(12)], ids=repr)
def test_compiled_and_exported(norm):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x, y):
            return add_norm(x, self.norm(y), self.norm)

    size = (2, 12, 3, 5) if isinstance(norm, LayerNorm2d) else (2, 3, 12)
    block, pair = Block(), (torch.randn(size), torch.randn(size))
    want = block(*pair)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    for got in (compiled(*pair), torch.export.export(block, pair).module()(*pair)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
