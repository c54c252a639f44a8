"""CUDA graphs of forward passes and training steps, replayed against eager results.

Without a GPU the same code runs eagerly in the place of the graph, so that it is not dead; what a
capture needs of us is proven in tests/test_tools/test_capture.py.
"""

import copy
import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('mmcv')

from backbone_cases import CASES, build
from fill import make_input
from interpreter import DEVICE

from mmhybrid.layers import SS2D, LocalVimMixer, MambaVisionMixer, VimMixer

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmark'
ON_GPU = DEVICE == 'cuda'
FAMILIES = list({case.values[0]: case for case in CASES}.values())
DTYPES = ['float32', 'float16', 'bfloat16'] if ON_GPU else ['float32']

pytestmark = [pytest.mark.gpu, pytest.mark.plain_empty]


@pytest.fixture
def captured(monkeypatch):
    """Captures a call; running the result fills what the call returned during the capture."""
    monkeypatch.syspath_prepend(str(FOLDER))
    timing = importlib.import_module('timing')
    return timing.as_graph if ON_GPU else timing.in_sequence


MIXERS = {
    'mambavision': (lambda: MambaVisionMixer(64), (2, 49, 64), ()),
    'mambavision plain': (lambda: MambaVisionMixer(64, fused=False), (2, 49, 64), ()),
    'mambavision lean': (lambda: MambaVisionMixer(64, lean=True), (2, 49, 64), ()),
    'vmamba': (lambda: SS2D(32, state_dim=1), (2, 8, 8, 32), ()),
    'vim': (lambda: VimMixer(32), (2, 65, 32), ()),
    'localvim': (lambda: LocalVimMixer(32, ('h', 'v', 'w2')), (2, 64, 32), ((8, 8),)),
}


def autocast(dtype):
    return torch.autocast(DEVICE, getattr(torch, dtype), enabled=dtype != 'float32')


def both_passes(module, x, rest, dtype):
    """A call that returns the outputs and the gradients of x and all parameters."""
    inputs = [p for p in (x, *module.parameters()) if p.requires_grad]

    def call():
        with autocast(dtype):
            y = module(x, *rest)
        ys = list(y) if isinstance(y, (tuple, list)) else [y]
        grads = torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys], allow_unused=True)
        return [y.detach() for y in ys] + [g for g in grads if g is not None]

    return call


def replayed(captured, call, x, values):
    """What a graph of the call gives for other values of x than it was captured with."""
    last = []

    def keep():
        last[:] = call()

    work = captured([keep])
    with torch.no_grad():
        x.copy_(values)
    work.run()
    if ON_GPU:
        torch.cuda.synchronize()
    return [y.clone() for y in last]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        scale = b.float().abs().max().item() or 1
        error = (a.float() - b.float()).abs().max().item()
        assert error <= 1e-3 * scale, f'tensor {i} of {tuple(b.shape)}: {error / scale:.1e}'


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', MIXERS)
def test_mixer(captured, name, dtype):
    make, shape, rest = MIXERS[name]
    torch.manual_seed(0)
    mixer = make().to(DEVICE)
    x, values = torch.zeros(shape, device=DEVICE).requires_grad_(), make_input(2, shape).to(DEVICE)
    got = replayed(captured, both_passes(mixer, x, rest, dtype), x, values)
    assert_same(got, both_passes(mixer, values.requires_grad_(), rest, dtype)())


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_backbone_forward(captured, cls, arguments, dtype):
    model = build(cls, arguments).eval().to(DEVICE)
    x, values = (make_input(seed, (2, 3, 64, 64)).to(DEVICE) for seed in (0, 1))

    def call():
        with torch.no_grad(), autocast(dtype):
            return list(model(x))

    got = replayed(captured, call, x, values)
    assert_same(got, call())


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('cls', 'arguments'), FAMILIES)
def test_training_step(captured, cls, arguments, dtype):
    """Forward and backward pass and the optimizer's step in one graph, several times."""
    start = build(cls, arguments).train().to(DEVICE)
    x = make_input(0, (2, 3, 64, 64)).to(DEVICE)
    found = []
    for way in ('graph', 'eager'):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            with autocast(dtype):
                maps = model(x)
            sum(y.float().square().mean() for y in maps).backward()
            optimizer.step()

        if way == 'graph':
            work = captured([step])
            model.load_state_dict(start.state_dict())  # the warm-up has trained
            run = work.run
        else:
            run = step
        for _ in range(3):
            run()
        found.append([p.detach().clone() for p in model.parameters()])
    graph, eager = found
    assert_same(graph, eager)
    moved = [not torch.equal(p, q) for p, q in zip(graph, start.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
