"""Cases of kernels that are written out, run by test_unrolled.py in Triton's interpreter.

The name of this file keeps pytest from collecting it together with the other tests.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from mmhybrid.ops.layer_norm import fused as norm
from mmhybrid.ops.layer_norm import triton_kernels as norm_kernels
from mmhybrid.ops.mambavision_mixer import triton_kernels as mixer_kernels
from mmhybrid.ops.selective_scan import kernels as scan_kernels
from mmhybrid.ops.unrolled import Unrolled
from mmhybrid.ops.walk_conv import triton_kernels as walk_kernels

sys.path.insert(0, str(Path(__file__).parent))  # other files of cases

from triton_cases import SMALL, gradients  # noqa: E402

assert os.environ.get('TRITON_INTERPRET') == '1', 'run test_unrolled.py instead'
torch.set_num_threads(1)


def write_out(monkeypatch, module):
    """Put written-out kernels in the place of a module's; the notes say which were launched."""
    launched = set()

    class Noted(Unrolled):
        def of(self, arguments):
            launched.add(self.kernel.fn.__name__)
            return super().of(arguments)

    names = [name for name in vars(module) if name.endswith('_kernel')]
    assert names
    for name in names:
        kernel = getattr(module, name)
        assert not isinstance(kernel, Unrolled), 'this Triton needs them written out anyway'
        monkeypatch.setattr(module, name, Noted(kernel))
    return set(names), launched


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


SCANS = {
    'plain': dict(state=2, length=5, gate=False, bias=False, softplus=False, batch=1),
    'everything': dict(state=2, length=9, order='with holes', reverse=True, batch=1),
    'ragged halves': dict(state=3, length=5, group_dim=3, groups=2, dtype=torch.bfloat16, batch=1),
}


@pytest.mark.parametrize('name', SCANS)
@pytest.mark.parametrize('chunk', [0, pytest.param(4, marks=pytest.mark.slow)])
def test_scan(name, chunk, monkeypatch):
    case = SMALL | SCANS[name]
    expected = gradients(case, chunk)
    names, launched = write_out(monkeypatch, scan_kernels)
    found = gradients(case, chunk)
    assert {'scan_forward_kernel', 'scan_backward_kernel'} <= launched <= names
    assert_same_bits(found, expected)


@pytest.mark.slow
def test_mixer(monkeypatch):
    from mixer_cases import make_mixer, results

    mixer = make_mixer(12, state_dim=2)
    x, dy = torch.randn(2, 2, 37, 12)
    expected = results(mixer, x, dy)
    names, launched = write_out(monkeypatch, mixer_kernels)
    found = results(mixer, x, dy)
    assert launched == names
    assert_same_bits(found, expected)


def test_walk_convolution(monkeypatch):
    from mmhybrid.ops.cross_scan import scan_plan
    from mmhybrid.ops.walk_conv import walk_conv

    plan = scan_plan(('h', 'w2_flip'), 2, 3)
    u, weight, bias = torch.randn(1, 3, 6), torch.randn(2, 3, 4), torch.randn(2, 3)

    def run():
        inputs = [x.clone().requires_grad_() for x in (u, weight, bias)]
        y = walk_conv(*inputs, plan.permutation(), plan.inverse_permutation())
        grads = torch.autograd.grad(y.square().sum(), inputs)
        return dict(zip('yuwb', (y.detach(), *grads), strict=True))

    expected = run()
    names, launched = write_out(monkeypatch, walk_kernels)
    found = run()
    assert launched == names
    assert_same_bits(found, expected)


@pytest.mark.parametrize('rms', [False, True])
@pytest.mark.parametrize('first', [False, True])
def test_norm(first, rms, monkeypatch):
    x, branch = torch.randn(2, 2, 3, 4, 5)
    scale, weight, bias = torch.randn(3, 5)
    factor = torch.tensor([0.0, 2.0])

    def run():
        norm.forget()
        inputs = [t.clone().requires_grad_() for t in (x, branch, weight, scale, bias)]
        given = *inputs[:3], None if rms else inputs[4]
        total, out = norm.add_norm(*given, 1e-5, None, inputs[3], factor, rms, first)
        wanted = inputs[:4] if rms else inputs
        grads = torch.autograd.grad(total.square().sum() + out.sin().sum(), wanted)
        return dict(zip('tyxbwsc', (total.detach(), out.detach(), *grads), strict=False))

    expected = run()
    names, launched = write_out(monkeypatch, norm_kernels)
    found = run()
    assert launched == names
    assert_same_bits(found, expected)
