"""Whole backbones under torch.compile and on fake tensors; the registry is the list of cases."""
import copy
import logging

import pytest
import torch
from backbone_cases import CASES, loss_of
from fill import fill_state_dict, make_input
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from mmhybrid.models.backbones import MambaVision
from mmhybrid.ops.cross_scan import scan_plan

pytestmark = pytest.mark.plain_empty


def tiny(arguments):
    """One block per stage, or two blocks: a compiler follows every block anew."""
    arch = dict(arguments['arch'])
    changes = {}
    if 'depths' in arch:
        arch['depths'], blocks = (1, 1, 1, 1), 4
    else:
        arch['depth'] = blocks = 2
        changes['out_indices'] = (1,)
    if 'directions' in arguments:
        changes['directions'] = arguments['directions'][:blocks]
    return arguments | changes | dict(arch=arch)


each_backbone = pytest.mark.parametrize(
    ('cls', 'arguments'),
    [pytest.param(case.values[0], tiny(case.values[1]), id=case.id) for case in CASES])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    logging.getLogger('torch._dynamo').setLevel(logging.ERROR)
    yield
    torch._dynamo.reset()


def run(model, x):
    """Maps and the gradients of all parameters."""
    model.zero_grad()
    maps = model(x)
    loss_of(maps).backward()
    return [y.detach() for y in maps], {n: p.grad for n, p in model.named_parameters()}


@each_backbone
def test_one_graph_with_gradients(cls, arguments):
    """Training in one graph gives what eager training gives, for each size a graph of its own."""
    eager = fill_state_dict(cls(**arguments), dt_bias=-1.0).train()
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    sizes = [(64, 48)]
    if cls.__name__ in LAST_OF_ITS_CLASS and arguments is LAST_OF_ITS_CLASS[cls.__name__]:
        sizes.append((80, 64))
    for frames, size in enumerate(sizes, 1):
        x = make_input(0, (2, 3, *size))
        results = []
        for network in (eager, compiled):
            torch.manual_seed(0)
            results.append(run(network, x))
        (maps, gradients), (maps_compiled, gradients_compiled) = results
        assert counter.frame_count == frames
        for y, want in zip(maps_compiled, maps, strict=True):
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        for (name, want), got in zip(gradients.items(), gradients_compiled.values(), strict=True):
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=name)


LAST_OF_ITS_CLASS = {case.values[0].__name__: case.values[1]
                     for case in each_backbone.args[1]}


@pytest.mark.slow
@each_backbone
def test_one_graph_for_many_sizes(cls, arguments):
    """Left to itself the compiler makes the second graph for any size of the same kind."""
    model = fill_state_dict(cls(**arguments), dt_bias=-1.0).eval()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in ((64, 96), (128, 160), (192, 96)):
        x = make_input(0, (1, 3, *size))
        with torch.no_grad():
            for y, want in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.parametrize('windows', ['published', 'tight'])
def test_one_compilation_for_the_sizes_of_a_recipe(windows):
    """As --compile has it: sizes are variables from the start, and no branch asks for them."""
    arch = dict(dim=16, stem_width=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2),
                window_size=(8, 8, 28, 14))
    model = MambaVision(arch, windows=windows, drop_path_rate=0.).eval()
    counter = CompileCounter()
    compiled = torch.compile(model.forward, backend=counter)
    for size in ((192, 256), (128, 320), (224, 352)):
        x = make_input(0, (2, 3, *size))
        for axis in (2, 3):
            torch._dynamo.maybe_mark_dynamic(x, axis)
        with torch.no_grad():
            for y, want in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_stochastic_depth_asks_for_no_sizes_either():
    """One draw decides about all windows of all stages; here each map is one window."""
    arch = dict(dim=16, stem_width=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
                window_size=(8, 8, 28, 14))
    model, counter = MambaVision(arch, drop_path_rate=0.5).train(), CompileCounter()
    compiled = torch.compile(model.forward, backend=counter)
    for size in ((192, 256), (128, 320)):
        x = make_input(0, (2, 3, *size))
        for axis in (2, 3):
            torch._dynamo.maybe_mark_dynamic(x, axis)
        with torch.no_grad():
            compiled(x)
    assert counter.frame_count == 1


@each_backbone
def test_fake_tensors(cls, arguments):
    """Shapes, dtypes and gradients without any arithmetic, and nothing fake stays behind."""
    x = make_input(0, (1, 3, 96, 64))
    with torch.no_grad():
        expected = [y.shape for y in cls(**arguments).eval()(x)]
    with FakeTensorMode():
        model = cls(**arguments)
        maps = model(torch.empty(1, 3, 96, 64))
        assert [y.shape for y in maps] == expected
        sum(y.sum() for y in maps).backward()
        for name, p in model.named_parameters():
            assert p.grad is None or p.grad.shape == p.shape, name
            assert (p.grad is not None) == p.requires_grad, name
    order = scan_plan(('v', 'w2'), 6, 4).orders[0].order
    assert type(order) is torch.Tensor and order[1] == 4
