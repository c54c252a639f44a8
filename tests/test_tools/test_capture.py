"""What a capture of a CUDA graph needs of us: no graph left behind, and nothing new at capture.

A GPU has to confirm that captures succeed (tests/test_gpu/test_graphs.py); this is what can be
proven without one.
"""

import ast
import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbone_cases import CASES, build, loss_of
from fill import make_input
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmhybrid.layers import SS2D, LocalVimMixer, MambaVisionMixer, VimMixer
from mmhybrid.ops.selective_scan import passes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'tools' / 'benchmark'


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('timing')


def lives(p):
    """Whether an autograd graph that holds this parameter lives: its node is then an old one."""

    def data():
        return p.view_as(p).grad_fn.next_functions[0][0].metadata

    data()['known'] = True
    return 'known' in data()


MIXERS = {
    'mambavision': (lambda: MambaVisionMixer(16, backend='torch'), (2, 9, 16), ()),
    'vmamba': (lambda: SS2D(8, state_dim=1), (2, 3, 4, 8), ()),
    'vim': (lambda: VimMixer(8), (1, 9, 8), ()),
    'localvim': (lambda: LocalVimMixer(8, ('h', 'v', 'w2')), (1, 12, 8), ((3, 4),)),
}


@pytest.mark.parametrize('name', MIXERS)
def test_no_graph_of_a_mixer_is_left_behind(timing, name):
    make, shape, rest = MIXERS[name]
    mixer = make()
    parameters = list(mixer.parameters())
    y = mixer(torch.randn(shape), *rest)
    assert all(map(lives, parameters))  # the probe sees a living graph
    y.sum().backward()
    del y
    assert not any(map(lives, parameters))
    assert timing.saved_bytes(lambda: mixer(torch.randn(shape), *rest), parameters) > 0
    assert not any(map(lives, parameters))


@pytest.mark.parametrize(('cls', 'arguments'), CASES)
def test_no_graph_of_a_backbone_is_left_behind(timing, cls, arguments):
    model = build(cls, arguments).train()
    x = make_input(0, (2, 3, 64, 64))
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss_of(model(x)).backward()
    timing.saved_bytes(lambda: model(x), parameters)
    assert not any(map(lives, parameters))


def test_an_operator_that_keeps_its_output_is_counted_and_let_go(timing):
    w = torch.randn(5, requires_grad=True)
    assert timing.saved_bytes(lambda: w.exp().exp()) == 2 * 5 * 4
    assert not lives(w)


# --- as_graph with everything of CUDA replaced ----------------------------------------------------


class NoGpu:
    """Streams and graphs that keep account of which stream is current, as PyTorch does."""

    def __init__(self):
        self.current, self.capturing, self.seen = 'default', None, []
        self.broken = None
        account = self

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def stream(own):
            before, account.current = account.current, own
            try:
                yield
            finally:
                account.current = before

        class Graph:
            def replay(self):
                account.seen.append('replay')

        class Capture:
            """As torch.cuda.graph: when its end fails, the stream stays."""

            def __init__(self, graph, stream=None):
                self.stream = stream or Stream()

            def __enter__(self):
                account.current = account.capturing = self.stream

            def __exit__(self, *_):
                account.capturing = None
                if account.broken:
                    raise RuntimeError('operation failed due to a previous error during capture')

        self.cuda = SimpleNamespace(
            Stream=Stream, stream=stream, CUDAGraph=Graph, graph=Capture,
            current_stream=lambda: Stream(),
        )

    def call(self):
        self.seen.append(('captured' if self.capturing else 'warm', self.current))
        if self.capturing and self.broken:
            raise self.broken


@pytest.fixture
def no_gpu(monkeypatch):
    account = NoGpu()
    for name, value in vars(account.cuda).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return account


def test_warmed_up_on_the_stream_of_the_capture(timing, no_gpu):
    work = timing.as_graph([no_gpu.call, no_gpu.call])
    kinds, streams = zip(*no_gpu.seen, strict=True)
    assert kinds == ('warm',) * 2 * timing.WARM_UPS + ('captured',) * 2
    assert len(set(streams)) == 1 and streams[0] != 'default' and no_gpu.current == 'default'
    work.run()
    assert no_gpu.seen[-1] == 'replay' and work.calls == 2


def test_a_failed_capture_says_what_broke_it_and_leaves_no_stream(timing, no_gpu, capsys):
    no_gpu.broken = RuntimeError('operation would make the legacy stream depend on ...')
    failures = timing.Failures()
    with failures.noted('training'):
        timing.as_graph([no_gpu.call])
    assert failures == ['training'] and no_gpu.current == 'default'
    said = capsys.readouterr().out
    assert said == (
        'FAILED training: RuntimeError: operation failed due to a previous error during capture '
        '(first came RuntimeError: operation would make the legacy stream depend on ...)\n')


def test_garbage_is_collected_before_the_capture(timing, no_gpu):
    alive = []

    class Garbage:
        def __init__(self):
            self.self = self

        def __del__(self):
            alive.append(no_gpu.capturing)

    Garbage()
    timing.as_graph([no_gpu.call])
    assert alive == [None]


# --- a call that has been seen compiles nothing, plans nothing and asks the GPU nothing -----------

#: Methods that wait for the GPU, and functions that copy from the host's pageable memory.
WAITING = {'item', 'tolist', 'cpu', 'numpy', 'nonzero', 'synchronize', 'is_nonzero', 'unique',
           'masked_select', 'equal', 'allclose'}


def waiting_calls(path):
    """(function, call) of a file, for calls that wait for a GPU."""
    found = []

    class Visitor(ast.NodeVisitor):
        where = ''

        def visit_FunctionDef(self, node):
            before, self.where = self.where, node.name
            self.generic_visit(node)
            self.where = before

        def visit_Call(self, node):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if name in WAITING:
                found.append((self.where, name))
            self.generic_visit(node)

    Visitor().visit(ast.parse(path.read_text()))
    return found


def test_no_operator_or_layer_waits_for_the_gpu():
    """Tables of orders are made once, on the CPU; nothing else may be here."""
    found = {}
    for folder in ('ops', 'layers'):
        for path in (ROOT / 'mmhybrid' / folder).rglob('*.py'):
            calls = waiting_calls(path)
            if calls:
                found[path.relative_to(ROOT / 'mmhybrid').as_posix()] = calls
    assert set(found) <= {'ops/cross_scan/orders.py', 'ops/selective_scan/cpp.py'}, found


@pytest.mark.parametrize(('cls', 'arguments'), CASES)
def test_no_backbone_waits_for_the_device(cls, arguments, monkeypatch):
    """A training step that has been seen asks no tensor for its values."""
    model = build(cls, arguments).train()
    x = make_input(0, (2, 3, 64, 64))

    def step():
        maps = model(x)
        torch.autograd.backward(maps, [torch.ones_like(y) for y in maps])

    step()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = {event.key for event in profiler.key_averages()}
    assert 'aten::convolution' in names and 'aten::convolution_backward' in names
    assert not names & {'aten::item', 'aten::_local_scalar_dense', 'aten::nonzero',
                        'aten::is_nonzero', 'aten::masked_select', 'aten::_unique2'}


class Crossings(TorchDispatchMode):
    """Operators whose tensors lie on several devices: copies, which a capture cannot hold."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors if x.dim()}) > 1:
            self.found.append(str(function))
        return out


@contextlib.contextmanager
def without_a_driver():
    """Skip where PyTorch starts CUDA even for tensors without memory (2.4 does)."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith('CUDA error: CUDA driver'):
            raise
        pytest.skip('this PyTorch starts CUDA for tensors without memory')


@pytest.mark.parametrize('side', [64, 80])
@pytest.mark.parametrize(('cls', 'arguments'), CASES)
def test_no_backbone_copies_from_the_host(cls, arguments, side):
    """A forward pass on a GPU that is not there, on tensors without values."""
    with without_a_driver(), FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device('cuda'):
            model, x = cls(**arguments).train(), torch.empty(2, 3, side, 64)
        assert x.is_cuda
        with Crossings() as probe:
            x.cpu()
        assert probe.found == ['aten._to_copy.default']
        with Crossings() as crossings:
            model(x)
    assert not crossings.found


class Refused(Exception):
    """Something that must not happen during a capture."""


@contextlib.contextmanager
def nothing_new(stub):
    """Refuses whatever is done for a kind of call that has not been seen."""

    def refuse(what):
        def refused(*_, **__):
            raise Refused(what)

        return refused

    import triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, 'compile', refuse('compiling'))
        patch.setattr(type(stub), 'load_binary', refuse('loading a kernel'))
        for kind in (passes.Forward, passes.Backward):
            patch.setattr(kind, '__init__', refuse('planning'))
        yield


def refusing_graph(stub):
    """torch.cuda.graph for the stub."""

    class Capture:
        def __init__(self, graph, stream=None):
            self.context = nothing_new(stub)

        def __enter__(self):
            self.context.__enter__()

        def __exit__(self, *error):
            self.context.__exit__(None, None, None)

    return Capture


@pytest.mark.slow
def test_a_capture_compiles_and_plans_nothing(timing, no_gpu, monkeypatch, tmp_path):
    """The scan, the scan in an order and every mixer, both passes, with a stub of the driver."""
    pytest.importorskip('triton', reason='the kernels need Triton')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    host = importlib.import_module('host')
    stub = host.Stub()
    monkeypatch.setattr(torch.cuda, 'graph', refusing_graph(stub))
    with stub.installed():
        for name, make in host.WORKS.items():
            run = host.passes_of(make(torch.device('cpu')))['forward+backward']
            with pytest.raises(Refused), nothing_new(stub):
                run()  # the stand-in sees a first call
            before = stub.launches
            timing.as_graph([run])
            assert stub.launches > before, name


assert str(FOLDER) not in sys.path
