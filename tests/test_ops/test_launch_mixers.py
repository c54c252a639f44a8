"""Prepared launches of the fused mixer, the convolution along walks and the norm, without a GPU.

As in test_launch.py a driver that takes notes stands in for a GPU. Every time a program runs, an
ordinary launch on the same tensors follows; both must hand the launchers the same.
"""

import contextlib
import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
from stub_machine import Machine, host

from mmhybrid.layers import MambaVisionMixer
from mmhybrid.ops import triton_support
from mmhybrid.ops.layer_norm import fused as norm
from mmhybrid.ops.mambavision_mixer import fused as mixer
from mmhybrid.ops.rotation import fused as rotation
from mmhybrid.ops.selective_scan import launch
from mmhybrid.ops.walk_conv import conv, walk_conv
from mmhybrid.ops.walk_scan import fused as walk_scan

triton = pytest.importorskip('triton', reason='the kernels need Triton')
if tuple(int(x) for x in triton.__version__.split('.')[:2]) < triton_support.MINIMUM_TRITON:
    pytest.skip('this Triton is too old for the scan', allow_module_level=True)
if triton_support.interpreting():
    pytest.skip('TRITON_INTERPRET=1 replaces the compiler', allow_module_level=True)

from mmhybrid.ops.layer_norm import triton_kernels as norm_kernels  # noqa: E402
from mmhybrid.ops.mambavision_mixer import triton_kernels as mixer_kernels  # noqa: E402
from mmhybrid.ops.rotation import triton_kernels as rotation_kernels  # noqa: E402
from mmhybrid.ops.selective_scan import kernels as scan_kernels  # noqa: E402
from mmhybrid.ops.walk_conv import triton_kernels as walk_kernels  # noqa: E402
from mmhybrid.ops.walk_scan import triton_kernels as gate_kernels  # noqa: E402

pytestmark = pytest.mark.plain_empty


class Watch:
    """What the programs of a run launched, and how many of them went past Triton."""

    def __init__(self, machine):
        self.machine, self.programs, self.direct, self.launched = machine, 0, 0, 0
        self.run = launch.Program.run

    def __call__(self, program, tensors, pointers):
        """In the place of the run of a program."""
        self.programs += 1
        for x, pointer in zip(tensors, pointers, strict=True):
            assert pointer == (None if x is None else x.data_ptr())
        notes, passed, expected = self.machine.notes, [], []
        through = triton.JITFunction.run

        def counted(kernel, *args, **options):
            passed.append(kernel)
            return through(kernel, *args, **options)

        with mock.patch.object(triton.JITFunction, 'run', counted):
            notes.clear()
            self.run(program, tensors, pointers)
            got = list(notes)
        self.direct += not passed
        notes.clear()
        with mock.patch.object(launch.Program, '_direct', lambda *_: False):
            self.run(program, tensors, pointers)
        expected = list(notes)
        self.launched += len(got)
        assert got == expected


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(triton.compiler, 'compile', machine.compile)
    kernels = [
        x for module in (
            scan_kernels, mixer_kernels, walk_kernels, norm_kernels, rotation_kernels, gate_kernels)
        for x in vars(module).values() if isinstance(x, triton.JITFunction)
    ]

    def forget():
        mixer.forget()
        conv.forget()
        norm.forget()
        rotation.forget()
        walk_scan.forget()
        for kernel in kernels:
            kernel.device_caches.clear()

    forget()
    with machine.installed():
        yield machine
    forget()


def check(machine, run, programs):
    """Each of several runs launches what Triton would, and the later ones go past it."""
    for turn in range(3):
        watch = Watch(machine)
        with mock.patch.object(
            launch.Program, 'run', lambda program, *given, watch=watch: watch(program, *given)
        ):
            run()
        assert watch.programs == programs and watch.launched >= programs
        assert watch.direct == (programs if turn else watch.direct)


# --- the mixer ------------------------------------------------------------------------------------


def case(dim=64, batch=2, length=70, dtype=torch.float32, turned=False, shift=0, **options):
    """A mixer and its tokens."""
    module = MambaVisionMixer(dim, fused=True, backend='triton', **options).to(dtype)
    memory = torch.randn(batch * length * dim + shift).to(dtype)[shift:]
    x = memory.view(batch, dim, length).mT if turned else memory.view(batch, length, dim)
    return module, x


def odd_weights(module, *names):
    """Parameters that lie at odd addresses."""
    for name in names:
        p = module.get_parameter(name)
        memory = torch.zeros(p.numel() + 1, dtype=p.dtype)[1:].view(p.shape)
        p.data = memory.copy_(p.data)
    return module


def strided_weights(module, *names):
    """Parameters that are every other number of something."""
    for name in names:
        p = module.get_parameter(name)
        p.data = torch.stack([p.data, p.data], -1)[..., 0]
    return module


def step(module, x, autocast=None):
    """A training step, for tokens that want a gradient."""
    x = x.detach().requires_grad_()

    def run():
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            y = module(x)
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape

    return run


OWN = ('conv1d_x.weight', 'conv1d_z.weight', 'dt_proj.bias', 'A_log', 'D')
VARIATIONS = {
    'the same': lambda: case(),
    'other length': lambda: case(length=100),
    'one chunk': lambda: case(length=8, batch=64),
    'other batch': lambda: case(batch=3),
    'other width': lambda: case(dim=80),
    'other state': lambda: case(state_dim=1),
    'other rank': lambda: case(dt_rank=3),
    'other taps': lambda: case(conv_size=5),
    'bfloat16': lambda: case(dtype=torch.bfloat16),
    'float16': lambda: case(dtype=torch.float16),
    'channel-major': lambda: case(turned=True),
    'odd address': lambda: case(shift=1),
    'lean': lambda: case(lean=True),
    'odd weights': lambda: (odd_weights(case()[0], *OWN), case()[1]),
    'one odd weight': lambda: (odd_weights(case()[0], 'D'), case()[1]),
    'strided weights': lambda: (strided_weights(case()[0], *OWN), case()[1]),
    'halves among weights': lambda: (_half(case()[0], *OWN), case()[1]),
}


def _half(module, *names):
    for name in names:
        p = module.get_parameter(name)
        p.data = p.data.half()
    return module


@pytest.mark.parametrize('autocast', [None, torch.bfloat16], ids=['plain', 'autocast'])
@pytest.mark.parametrize('variation', VARIATIONS)
def test_no_record_is_stale(variation, autocast, machine):
    """The mixer's two programs forward, and three backward; one more for a lean mixer."""
    module, x = case()
    check(machine, step(module, x), 5)
    module, x = VARIATIONS[variation]()
    run = step(module, x, autocast)
    check(machine, run, 6 if module.lean else 5)
    with torch.no_grad(), torch.autocast('cpu', autocast, enabled=autocast is not None):
        check(machine, lambda: module(x), 2)
    check(machine, run, 6 if module.lean else 5)
    module, x = case()
    check(machine, step(module, x), 5)


def test_grad_modes_and_frozen_parameters(machine):
    module, x = case()
    check(machine, step(module, x), 5)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            check(machine, lambda: module(x), 2)
    module.requires_grad_(False)
    check(machine, step(module, x), 5)
    check(machine, lambda: module(x), 2)
    module.D.requires_grad_()
    check(machine, step(module, x), 5)


def test_a_record_is_asked_for_what_was_asked_before(machine):
    """Another wish for the scan or for the kernels is not answered from a record."""
    module, x = case()
    check(machine, lambda: module(x), 2)
    with mock.patch.object(MambaVisionMixer, 'path', lambda *_: pytest.fail('asked again')):
        module(x)
    for fused_, backend in (('auto', 'triton'), (True, 'auto')):
        module.fused, module.backend = fused_, backend
        with mock.patch.object(MambaVisionMixer, 'path', lambda *_: 'plain'), mock.patch.object(
            module, '_forward_plain', lambda x: 'plain'
        ):
            assert module(x) == 'plain'
    module.fused = False
    with mock.patch.object(module, '_forward_plain', lambda x: 'plain'):
        assert module(x) == 'plain'


def test_the_environment_may_name_another_scan(machine, monkeypatch):
    module, x = case()
    module.backend = module.fused = 'auto'
    monkeypatch.setenv('MMHYBRID_SCAN_BACKEND', 'triton')
    assert module.path(x) == 'fused'
    check(machine, lambda: module(x), 2)
    monkeypatch.setenv('MMHYBRID_SCAN_BACKEND', 'torch')
    assert module.path(x) == 'plain'
    machine.notes.clear()
    module(x)
    assert not machine.notes


def test_weights_that_move(machine):
    """An optimiser changes weights in place, a user replaces them; addresses are read anew."""
    module, x = case()
    run = step(module, x)
    check(machine, run, 5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    check(machine, run, 5)
    for name in OWN:
        p = module.get_parameter(name)
        p.data = p.data.clone()
    check(machine, run, 5)
    module.D = torch.nn.Parameter(module.D.detach().half())
    check(machine, run, 5)


def test_saved_tensors_that_come_back_elsewhere(machine):
    module, x = case()
    check(machine, step(module, x), 5)

    def unpack(given):
        odd = torch.zeros(given.numel() + 1, dtype=given.dtype)[1:].view(given.shape)
        return odd.copy_(given)

    def unpack_strided(given):
        return torch.stack([given, given], -1)[..., 0]

    for hook in (unpack, unpack_strided):
        with torch.autograd.graph.saved_tensors_hooks(lambda given: given, hook):
            check(machine, step(module, x), 5)
    check(machine, step(module, x), 5)


def test_gradients_of_other_strides(machine):
    module, x = case()
    x = x.requires_grad_()
    leaves = [x, *module.parameters()]
    dense = torch.ones_like(x)
    for dy in (dense, dense.mT.contiguous().mT, dense[:1, :1, :1].expand(x.shape)):
        run = lambda dy=dy: torch.autograd.grad(module(x), leaves, dy)  # noqa: E731
        check(machine, run, 5)


def test_one_launch_prepares_and_none_copies(machine):
    """Launches of a step: one before the scan each way, one behind its gradient, and the scan's."""
    module, x = case(length=8, batch=64)
    run = step(module, x)
    for _ in range(3):
        run()
    machine.notes.clear()
    with torch.no_grad():
        module(x)
    assert len(machine.notes) == 2
    machine.notes.clear()
    run()
    assert len(machine.notes) == 2 + 1 + 2 + 1


def test_records_hold_no_tensors(machine):
    alive = []
    take = machine.launch

    def note(*arguments):
        alive.extend(weakref.ref(x) for x in arguments if isinstance(x, torch.Tensor))
        take(*arguments)

    machine.notice = note
    run = step(*case())
    for _ in range(4):
        run()
    del run
    gc.collect()
    assert len(alive) > 20 and mixer._CALLS
    assert not [x() for x in alive if x() is not None]


def test_two_steps_in_flight(machine):
    """The second step's forward pass comes before the first one's backward pass."""
    module, x = case()
    x = x.requires_grad_()

    def run():
        first, second = module(x), module(x[:, :50])
        torch.autograd.grad(first, x, torch.ones_like(first))
        torch.autograd.grad(second, x, torch.ones_like(second))

    check(machine, run, 10)


@pytest.mark.parametrize('name', ['vmap', 'a dispatch mode', 'forward mode', 'tracing', 'fake'])
def test_whatever_looks_inside_gets_the_operator(name, machine):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    module, x = case()
    check(machine, lambda: module(x), 2)
    assert mixer._CALLS
    contexts = {'a dispatch mode': Log, 'forward mode': forward_ad.dual_level}
    with mock.patch.object(mixer._Call, '__call__', lambda *_: pytest.fail('a record was used')):
        if name == 'vmap':
            with contextlib.suppress(RuntimeError, NotImplementedError):
                torch.func.vmap(module)(x[None])
        elif name == 'tracing':
            torch.jit.trace(module, x, check_trace=False)
        elif name == 'fake':
            real = (x, *_weights(module))
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in real]
                assert mixer.fused_mixer(*fakes).shape == x.shape
        else:
            with contexts[name]():
                module(x)


def _weights(module):
    return [p.detach() for p in (
        module.in_proj.weight, module.conv1d_x.weight, module.conv1d_z.weight,
        module.x_proj.weight, module.dt_proj.weight, module.dt_proj.bias, module.A_log, module.D,
        module.out_proj.weight)]


def test_threads_share_a_record(machine):
    module, _ = case()
    given = [case()[1] for _ in range(4)]
    together, failures = threading.Barrier(4), []

    def work(x):
        try:
            together.wait()
            with torch.no_grad():
                for _ in range(5):
                    module(x)
        except Exception as error:  # shown by the assertion
            failures.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = module.conv1d_x.weight.data_ptr()
    assert not failures
    assert sum(own in arguments for _, _, arguments in machine.notes) == 4 * 5


@pytest.mark.parametrize('name', sorted(set(host.WORKS) - {'scan', 'ordered scan'}))
def test_calls_of_functions_do_not_grow(name, machine):
    machine.notice = lambda *_: None
    most = host.TARGETS[name]
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        runs = host.passes_of(host.WORKS[name](torch.device('cpu')))
        for _ in range(3):
            runs['forward+backward']()
        for kind, calls in (('forward', most.forward_calls), ('forward+backward', most.both_calls)):
            found = host.count_calls(runs[kind])
            # Python sees calls of isinstance and len or not, as it has specialised their callers.
            notes = sum(found[name] for name in ('stub_machine.py', 'test_launch_mixers.py',
                                                 'isinstance', 'len'))
            assert calls / 2 < found.total() - notes <= calls


# --- the convolution along walks ------------------------------------------------------------------


def walks(channels=40, batch=2, length=50, extra=0, taps=4, dtype=torch.bfloat16, turned=False,
          shift=0, of_weights=torch.float32, K=2):
    memory = torch.randn(batch * length * channels + shift).to(dtype)[shift:]
    u = memory.view(batch, channels, length)
    if not turned:
        u = memory.view(batch, length, channels).mT
    slots = torch.stack([torch.randperm(length + extra) for _ in range(K)]).int()
    weight, bias = (torch.randn(s).to(of_weights) for s in ((K, channels, taps), (K, channels)))
    return [u, weight, bias, slots, slots.argsort(1).int()]


def _turned(tensors, *which):
    return [torch.stack([x, x], -1)[..., 0] if i in which else x for i, x in enumerate(tensors)]


WALKS = {
    'the same': lambda: walks(),
    'other length': lambda: walks(length=64),
    'zero tokens': lambda: walks(extra=7),
    'other batch': lambda: walks(batch=3),
    'other channels': lambda: walks(channels=65),
    'other taps': lambda: walks(taps=3),
    'one walk': lambda: walks(K=1),
    'float32': lambda: walks(dtype=torch.float32),
    'half weights': lambda: walks(of_weights=torch.float16),
    'channel-major': lambda: walks(turned=True),
    'odd address': lambda: walks(shift=1),
    'strided weights and tables': lambda: _turned(walks(), 1, 2, 3, 4),
}


def convolve(tensors, *leaves):
    tensors = [x.detach().requires_grad_(i in leaves) for i, x in enumerate(tensors)]
    wanted = [tensors[i] for i in leaves]

    def run():
        y = walk_conv(*tensors)
        for leaf, grad in zip(wanted, torch.autograd.grad(y, wanted, torch.ones_like(y)),
                              strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape

    return run


@pytest.mark.parametrize('variation', WALKS)
def test_no_record_of_a_walk_is_stale(variation, machine):
    check(machine, convolve(walks(), 0, 1, 2), 2)
    tensors = WALKS[variation]()
    check(machine, convolve(tensors, 0, 1, 2), 2)
    check(machine, convolve(tensors, 0), 2)
    check(machine, convolve(tensors, 2), 2)
    with torch.no_grad():
        check(machine, lambda: walk_conv(*tensors), 1)
    check(machine, convolve(walks(), 0, 1, 2), 2)


def test_gradients_of_walks_with_other_strides(machine):
    tensors = walks()
    u = tensors[0].requires_grad_()
    y = walk_conv(*tensors)
    dense = torch.ones(y.shape, dtype=y.dtype)
    odd = torch.ones(y.numel() + 1, dtype=y.dtype)[1:].view(y.shape)
    for dy in (torch.ones_like(y), dense, dense[:1, :1, :1, :1].expand(y.shape), odd):
        run = lambda dy=dy: torch.autograd.grad(walk_conv(*tensors), u, dy)  # noqa: E731
        check(machine, run, 2)


def test_walks_of_known_kind_are_still_refused_where_they_do_not_fit(machine):
    tensors = walks()
    check(machine, lambda: walk_conv(*tensors), 1)
    for i, wrong in ((1, tensors[1][:1]), (2, tensors[2][:, :-1]), (3, tensors[3][:, :-1])):
        given = [*tensors]
        given[i] = wrong
        for _ in range(2):
            with pytest.raises(ValueError, match='walk_conv expects'):
                walk_conv(*given)


# --- the scan along walks -------------------------------------------------------------------------


def mixers(channels=40, batch=2, length=50, extra=0, dtype=torch.bfloat16, state=4, rank=4, K=2,
           shift=0):
    """uz, conv_weight, conv_bias, w_x, w_dt, dt_bias, A, D, slots and steps."""
    memory = torch.randn(batch * length * 2 * channels + shift).to(dtype)[shift:]
    of_conv = [torch.randn(s) for s in ((K, channels, 4), (K, channels))]
    factors = [torch.randn(s).to(dtype) for s in (
        (K, rank + 2 * state, channels), (K, channels, rank))]
    rest = [torch.randn(s) for s in ((K * channels,), (K * channels, state), (K * channels,))]
    slots = torch.stack([torch.randperm(length + extra) for _ in range(K)]).int()
    return [memory.view(batch, length, 2 * channels), *of_conv, *factors, *rest, slots,
            slots.argsort(1).int()]


SCANS = {
    'the same': lambda: mixers(),
    'other length': lambda: mixers(length=64),
    'other batch': lambda: mixers(batch=3),
    'other channels': lambda: mixers(channels=65),
    'other states': lambda: mixers(state=3),
    'other rank': lambda: mixers(rank=3),
    'one walk': lambda: mixers(K=1),
    'float32': lambda: mixers(dtype=torch.float32),
    'odd address': lambda: mixers(shift=1),
    'strided weights and tables': lambda: _turned(mixers(), 1, 2, 3, 4, 8, 9),
}


def scan_along(tensors, factor, *leaves):
    tensors = [x.detach().requires_grad_(i in leaves) for i, x in enumerate(tensors)]
    wanted = [tensors[i] for i in leaves]

    def run():
        y = walk_scan.walk_scan(*tensors, factor)
        for leaf, grad in zip(wanted, torch.autograd.grad(y, wanted, torch.ones_like(y)),
                              strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape

    return run


@pytest.mark.parametrize('variation', SCANS)
def test_no_record_of_a_scan_along_walks_is_stale(variation, machine):
    every = range(8)
    check(machine, scan_along(mixers(), 0.5, *every), 6)
    tensors = SCANS[variation]()
    check(machine, scan_along(tensors, 0.5, *every), 6)
    check(machine, scan_along(tensors, 1., 0), 6)
    check(machine, scan_along(tensors, None, *every), 4)
    with torch.no_grad():
        check(machine, lambda: walk_scan.walk_scan(*tensors, 0.5), 3)
        check(machine, lambda: walk_scan.walk_scan(*tensors, None), 2)
    check(machine, scan_along(mixers(extra=7), None, *every), 4)
    check(machine, scan_along(mixers(), 0.5, *every), 6)


def test_gradients_of_a_scan_along_walks_with_other_strides(machine):
    for factor, programs in ((0.5, 6), (None, 4)):
        tensors = mixers()
        uz = tensors[0].requires_grad_()
        y = walk_scan.walk_scan(*tensors, factor)
        dense = torch.ones(y.shape, dtype=y.dtype)
        odd = torch.ones(y.numel() + 1, dtype=y.dtype)[1:].view(y.shape)
        for dy in (torch.ones_like(y), dense, dense.flatten()[:1].expand(y.shape), odd):
            def run(tensors=tensors, factor=factor, uz=uz, dy=dy):
                torch.autograd.grad(walk_scan.walk_scan(*tensors, factor), uz, dy)

            check(machine, run, programs)


# --- the turned sum -------------------------------------------------------------------------------


def turned(batch=2, length=9, channels=12, stream=torch.float32, hidden=torch.bfloat16,
           factor=True, shift=0):
    """stream, hidden, factor, cos and sin."""
    size = batch, length, channels
    memory = torch.randn(torch.Size(size).numel() + shift).to(hidden)[shift:]
    return [
        None if stream is None else torch.randn(size).to(stream), memory.view(size),
        torch.rand(batch) if factor else None, *torch.randn(2, length, channels),
    ]


TURNED = {
    'the same': lambda: turned(),
    'other length': lambda: turned(length=16),
    'other batch': lambda: turned(batch=3),
    'other channels': lambda: turned(channels=16),
    'no stream': lambda: turned(stream=None),
    'nothing dropped': lambda: turned(factor=False),
    'half stream': lambda: turned(stream=torch.bfloat16),
    'float32': lambda: turned(hidden=torch.float32),
    'odd address': lambda: turned(shift=1),
}


@pytest.mark.parametrize('variation', TURNED)
def test_no_record_of_a_turned_sum_is_stale(variation, machine):
    def step(given):
        leaves = [x.requires_grad_() for x in given[:2] if x is not None]

        def run():
            y = rotation.rotated_sum(*given)
            for dy in (torch.ones_like(y), y.detach().mT.contiguous().mT):
                torch.autograd.grad(y, leaves, dy, retain_graph=True)

        return run

    check(machine, step(turned()), 3)
    given = TURNED[variation]()
    with torch.no_grad():
        check(machine, lambda: rotation.rotated_sum(*given), 1)
    check(machine, step(given), 3)
    check(machine, step(turned()), 3)


# --- sum and norm ---------------------------------------------------------------------------------


def tokens(size=(2, 50, 40), x=torch.bfloat16, branch=torch.bfloat16, scale=False, factor=False,
           turned=False, shift=0):
    """Residual, branch, scale, factor, weight and bias."""
    def of_tokens(dtype):
        memory = torch.randn(torch.Size(size).numel() + shift).to(dtype)[shift:]
        if turned:
            return memory.view(size[0], size[-1], *size[1:-1]).movedim(1, -1)
        return memory.view(size)

    of_channels = [torch.randn(size[-1]) for _ in range(3)]
    return [
        of_tokens(x), None if branch is None else of_tokens(branch),
        of_channels[0] if scale else None, torch.rand(size[0]) if factor else None,
        *of_channels[1:],
    ]


NORMS = {
    'the same': lambda: tokens(),
    'other length': lambda: tokens((2, 64, 40)),
    'other batch': lambda: tokens((3, 50, 40)),
    'map': lambda: tokens((2, 5, 10, 40)),
    'other channels': lambda: tokens((2, 50, 48)),
    'float32': lambda: tokens(x=torch.float32),
    'float16 branch': lambda: tokens(branch=torch.float16),
    'scaled': lambda: tokens(scale=True),
    'dropped': lambda: tokens(factor=True),
    'alone': lambda: tokens(branch=None),
    'channel-major': lambda: tokens(turned=True),
    'odd address': lambda: tokens(shift=1),
    'strided weights': lambda: _turned(tokens(), 4, 5),
    'no common step': lambda: [
        x.transpose(1, 2).contiguous().transpose(1, 2) if i < 2 else x
        for i, x in enumerate(tokens((2, 5, 10, 40)))],
}


def add_norm(x, branch, scale, factor, weight, bias, **options):
    """Results that there are."""
    if branch is None:
        return [norm.norm(x, weight, bias, 1e-5, torch.bfloat16, **options)]
    rest = dict(scale=scale, factor=factor) | options
    return norm.add_norm(x, branch, weight, bias, 1e-5, torch.bfloat16, **rest)


def norm_step(given, *, read=slice(None), **options):
    """A training step; all that may have a gradient wants it."""
    leaves = [x for i, x in enumerate(given) if x is not None and i != 3]

    def run():
        found = add_norm(*given, **options)[read]
        torch.autograd.grad(found, leaves, [torch.ones_like(y) for y in found])

    for x in leaves:
        x.requires_grad_()
    return run


@pytest.mark.parametrize('variation', NORMS)
def test_no_record_of_a_norm_is_stale(variation, machine):
    check(machine, norm_step(tokens()), 2)
    given = NORMS[variation]()
    with torch.no_grad():
        check(machine, lambda: add_norm(*given), 1)
    check(machine, norm_step(given), 2)
    check(machine, norm_step(given, channels_first=True), 2)
    if given[1] is not None:
        check(machine, norm_step(given, read=slice(1)), 2)
        check(machine, norm_step(given, read=slice(1, 2)), 2)
    given[4].requires_grad_(False)
    check(machine, lambda: add_norm(*given), 1)
    check(machine, norm_step(tokens()), 2)


def test_dtype_and_epsilon_of_a_norm_are_part_of_a_record(machine):
    given = tokens(branch=None)
    for dtype in (torch.bfloat16, torch.float32):
        for eps in (1e-5, 1e-6):
            check(machine, lambda: norm.norm(given[0], *given[4:], eps, dtype), 1)  # noqa: B023
            assert norm.norm(given[0], *given[4:], eps, dtype).dtype == dtype
    assert len(norm._CALLS) == 4
    with pytest.raises(ValueError, match='expects branch like x'):
        norm.norm(given[0], given[4][:3], None, 1e-5)
