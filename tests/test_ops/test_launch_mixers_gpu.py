"""Direct launches of the mixer and of walks on a GPU: the bits of ordinary ones, and taken."""

import pytest
import torch

from mmhybrid.layers import MambaVisionMixer
from mmhybrid.ops import triton_support
from mmhybrid.ops.mambavision_mixer import fused as mixer
from mmhybrid.ops.selective_scan import launch
from mmhybrid.ops.walk_conv import conv, walk_conv

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
    pytest.mark.skipif(
        triton_support.unavailable_reason() is not None or triton_support.interpreting(),
        reason='needs Triton',
    ),
]


def forget():
    mixer.forget()
    conv.forget()


@pytest.fixture(autouse=True)
def nothing_known():
    forget()
    yield
    forget()


def check(run, programs, monkeypatch):
    """Four runs and an ordinary one agree in every bit; the last two runs are direct."""
    with monkeypatch.context() as patch:
        patch.setenv(launch.VARIABLE, '0')
        expected = run()
    forget()
    seen, direct = [], launch.Program._direct

    def noted(self, pointers):
        seen.append(direct(self, pointers))
        return seen[-1]

    monkeypatch.setattr(launch.Program, '_direct', noted)
    for _ in range(4):
        for got, value in zip(run(), expected, strict=True):
            assert got.dtype == value.dtype and torch.equal(got, value)
    assert seen == [True] * (2 * programs)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('options', [
    dict(), dict(lean=True), dict(state_dim=1), dict(conv_size=5)], ids=str)
def test_mixer(options, autocast, monkeypatch):
    torch.manual_seed(0)
    module = MambaVisionMixer(160, fused=True, **options).cuda()
    x = torch.randn(2, 300, 160, device='cuda', requires_grad=True)
    dy = torch.randn(2, 300, 160, device='cuda')

    def run():
        with torch.autocast('cuda', autocast, enabled=autocast is not None):
            y = module(x)
        return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))

    check(run, 6 if module.lean else 5, monkeypatch)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_walks(dtype, monkeypatch):
    torch.manual_seed(0)
    u = torch.randn(2, 300, 96, device='cuda', dtype=dtype).mT.requires_grad_()
    weight, bias = (torch.randn(s, device='cuda').requires_grad_() for s in ((2, 96, 4), (2, 96)))
    slots = torch.stack([torch.randperm(300) for _ in range(2)]).int()
    steps = slots.argsort(1).int().cuda()
    slots = slots.cuda()

    def run():
        y = walk_conv(u, weight, bias, slots, steps)
        return y.detach(), *torch.autograd.grad(y.float().sum(), [u, weight, bias])

    check(run, 2, monkeypatch)
