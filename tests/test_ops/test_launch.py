"""Prepared launches: each hands the launchers what an ordinary launch on the same tensors would.

A driver that takes notes stands in for a GPU, and a compiler that gives every specialisation of a
kernel a function of its own; all Python of Triton's between them runs.
"""

import contextlib
import gc
import logging
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from stub_machine import Machine, host

from mmhybrid.ops import selective_scan, selective_scan_ordered, triton_support
from mmhybrid.ops.selective_scan import launch, triton_backend

triton = pytest.importorskip('triton', reason='the kernels need Triton')
if launch.unknown_launchers():
    pytest.skip(launch.unknown_launchers(), allow_module_level=True)
if triton_support.interpreting():
    pytest.skip('TRITON_INTERPRET=1 replaces the compiler', allow_module_level=True)

from mmhybrid.ops.mambavision_mixer import triton_kernels as mixer_kernels  # noqa: E402
from mmhybrid.ops.selective_scan import kernels as scan_kernels  # noqa: E402
from mmhybrid.ops.walk_conv import triton_kernels as walk_kernels  # noqa: E402

pytestmark = pytest.mark.plain_empty
_NEW = {name: getattr(torch.Tensor, name) for name in ('new_empty', 'new_empty_strided')}


class Arena:
    """Hands out the same memory in the same sequence once ``used`` is set back."""

    def __init__(self):
        self.memory, self.used = torch.zeros(1 << 21), 0

    def new_empty(self, size):
        size = (size,) if isinstance(size, int) else tuple(size)
        return self.take(size, torch.empty(size, device='meta').stride(), torch.float32)

    def take(self, size, stride, dtype):
        numel = torch.Size(size).numel()
        start, self.used = self.used, self.used + -(-numel // 32) * 32
        memory = self.memory[start : self.used].view(dtype)
        return memory.as_strided(size, stride, memory.storage_offset())


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(triton.compiler, 'compile', machine.compile)
    kernels = [
        x for module in (scan_kernels, mixer_kernels, walk_kernels)
        for x in vars(module).values() if isinstance(x, triton.JITFunction)
    ]
    arena = machine.arena = Arena()
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda x, size: arena.new_empty(size))
    monkeypatch.setattr(
        torch.Tensor, 'new_empty_strided',
        lambda x, size, stride: arena.take(size, stride, x.dtype),
    )

    def forget():
        triton_backend.forget()
        launch._say_that_launches_stay_ordinary.cache_clear()
        for kernel in kernels:
            kernel.device_caches.clear()

    forget()
    with machine.installed():
        yield machine
    forget()


def noted(machine, run, ordinary=False):
    """The launches of a run, and how many of them went through Triton."""
    machine.arena.used = 0
    machine.notes.clear()
    passed = []
    through = triton.JITFunction.run

    def counted(self, *args, **options):
        passed.append(self)
        return through(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, 'run', counted)
        if ordinary:
            patch.setattr(launch.Program, '_direct', lambda *_: False)
        run()
    return list(machine.notes), len(passed)


def check(machine, run):
    """The first, second and later runs launch as Triton does; later ones without Triton."""
    runs = [noted(machine, run) for _ in range(4)]
    expected, through = noted(machine, run, ordinary=True)
    assert expected and through == len(expected)
    for notes, _ in runs:
        assert notes == expected
    assert [passed for _, passed in runs[2:]] == [0, 0]


def inputs(batch=2, channels=64, length=96, state=8, dtype=torch.bfloat16, major='token', shift=0):
    def tokens(n):
        memory = torch.randn(batch * length * n + shift).to(dtype)[shift:]
        if major == 'channel':
            return memory.view(batch, n, length)
        return memory.view(batch, length, n).mT

    return dict(
        u=tokens(channels), delta=tokens(channels), A=-torch.rand(channels, state),
        B=tokens(state), C=tokens(state), D=torch.randn(channels), delta_bias=torch.randn(channels),
        delta_softplus=True,
    )


def both_passes(call, names=('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias'), **options):
    """A run of the forward and the backward pass for inputs by name."""
    leaves = {k: x.detach().requires_grad_() if k in names and x is not None else x
              for k, x in options.items()}
    wanted = [x for x in leaves.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    dy = torch.ones_like(options['u'])

    def run():
        y = call(**leaves, backend='triton')
        y = y[0] if isinstance(y, tuple) else y
        if wanted and torch.is_grad_enabled():
            return torch.autograd.grad(y, wanted, dy.as_strided(y.shape, y.stride()))

    return run


VARIATIONS = {
    'the same': lambda x: x,
    'other length': lambda x: inputs(length=100),
    'one chunk': lambda x: inputs(length=8, batch=64),
    'other batch': lambda x: inputs(batch=3),
    'other channels': lambda x: inputs(channels=80),
    'other state': lambda x: inputs(state=1),
    'float16': lambda x: inputs(dtype=torch.float16),
    'float32': lambda x: inputs(dtype=torch.float32),
    'channel-major': lambda x: inputs(major='channel'),
    'odd address': lambda x: inputs(shift=1),
    'one odd address': lambda x: x | dict(delta=inputs(shift=1)['delta']),
    'mixed dtypes': lambda x: x | dict(delta=x['delta'].float()),
    'columns': lambda x: x | dict(u=torch.randn(2, 96, 130).bfloat16()[..., 2:66].mT),
    'every other token': lambda x: x | dict(B=torch.randn(2, 192, 8).bfloat16()[:, ::2].mT),
    'a shared row': lambda x: x | dict(u=torch.randn(2, 1, 64).bfloat16().expand(2, 96, 64).mT),
    'groups': lambda x: x | dict(B=torch.randn(2, 2, 8, 96), C=torch.randn(2, 2, 8, 96)),
    'no skip': lambda x: x | dict(D=None),
    'no bias': lambda x: x | dict(delta_bias=None),
    'gate': lambda x: x | dict(z=inputs()['u']),
    'no softplus': lambda x: x | dict(delta_softplus=False),
    'reverse': lambda x: x | dict(reverse=True),
    'last state': lambda x: x | dict(return_last_state=True),
    'parameters': lambda x: x | {k: torch.nn.Parameter(x[k]) for k in ('A', 'D', 'delta_bias')},
}


@pytest.mark.parametrize('variation', VARIATIONS)
def test_no_record_is_stale(variation, machine):
    base = inputs()
    check(machine, both_passes(selective_scan, **base))
    run = both_passes(selective_scan, **VARIATIONS[variation](base))
    check(machine, run)
    with torch.no_grad():
        check(machine, run)
    check(machine, both_passes(selective_scan, **base))


def test_gradients_of_some_inputs(machine):
    base = inputs()
    for names in (('u',), ('A', 'D'), ('B',), ()):
        check(machine, both_passes(selective_scan, names, **base))


def test_grad_modes_autocast_and_inference(machine):
    run = both_passes(selective_scan, **inputs())
    check(machine, run)
    for context in (torch.no_grad, torch.inference_mode,
                    lambda: torch.autocast('cpu', dtype=torch.bfloat16)):
        with context():
            check(machine, run)
        check(machine, run)


def test_orders(machine):
    for groups in (1, 2):
        x = inputs()
        x |= {k: x[k].unflatten(1, (groups, -1)) for k in ('u', 'delta')}
        x |= {k: torch.randn(2, groups, 8, 96) for k in ('B', 'C')}
        for rows, length in ((1, 96), (groups, 96), (groups, 99)):
            order = torch.randint(0, 96, (rows, length), dtype=torch.int32)
            check(machine, both_passes(selective_scan_ordered, **x, order=order))
            aside = torch.cat([order.flatten(), order.flatten()])[1:][: order.numel()]
            check(machine, both_passes(selective_scan_ordered, **x, order=aside.view(rows, -1)))


def test_a_cotangent_of_other_strides(machine):
    x = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
    leaves = [v for v in x.values() if isinstance(v, torch.Tensor)]
    dense = torch.ones(2, 64, 96, dtype=torch.bfloat16)
    for dy in (dense, dense.mT.contiguous().mT, dense[:, :1, :1].expand(2, 64, 96),
               torch.ones(2 * 64 * 96 + 1, dtype=torch.bfloat16)[1:].view(2, 64, 96)):
        check(machine, lambda dy=dy: torch.autograd.grad(
            selective_scan(**x, backend='triton'), leaves, dy))


def test_saved_tensors_that_come_back_changed(machine):
    """A hook may keep copies with other strides and addresses."""
    x = inputs()
    run = both_passes(selective_scan, **x)
    check(machine, run)

    def unpack(given):
        odd = torch.zeros(given.numel() + 1, dtype=given.dtype)[1:].view(given.shape)
        return odd.copy_(given)

    def aligned(notes):
        return [
            (function, grid, [x & 15 if type(x) is int and x > 1 << 32 else x for x in arguments])
            for function, grid, arguments in notes
        ]

    with torch.autograd.graph.saved_tensors_hooks(lambda given: given, unpack):
        runs = [noted(machine, run) for _ in range(4)]
        expected, _ = noted(machine, run, ordinary=True)
    assert all(aligned(notes) == aligned(expected) for notes, _ in runs)
    assert runs[-1][1] == 0
    check(machine, run)


def test_tensors_that_were_changed_in_place(machine):
    x = inputs()
    u = x.pop('u')
    leaf = x['delta'].requires_grad_()
    run = lambda: selective_scan(u, **x, backend='triton')  # noqa: E731
    for _ in range(3):
        run()
    y = run()
    u.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        torch.autograd.grad(y, leaf, torch.ones_like(y))
    dy = torch.ones_like(u)
    check(machine, lambda: torch.autograd.grad(run(), leaf, dy))
    machine.arena.take = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    y = run()
    y.mul_(2)  # y is no view, so a caller may change it
    torch.autograd.grad(y, leaf, dy)


def test_gradients_do_not_hold_memory_over_tokens(machine):
    x = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
    sizes = []
    take = machine.arena.take
    machine.arena.take = lambda *a: sizes.append(torch.Size(a[0]).numel()) or take(*a)
    y = selective_scan(**x, backend='triton')
    sizes.clear()
    leaves = [v for v in x.values() if isinstance(v, torch.Tensor)]
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    parameters = 64 * 8 + 2 * 64
    assert len(sizes) == 2 and sizes[1] == parameters < sizes[0]


def test_somebody_listens_to_launches(machine):
    from triton.knobs import runtime

    run = both_passes(selective_scan, **inputs())
    check(machine, run)
    heard = []
    runtime.launch_enter_hook.add(heard.append)
    try:
        notes, through = noted(machine, run)
        assert heard == ['metadata'] * len(notes) and through == len(notes)
    finally:
        runtime.launch_enter_hook.remove(heard.append)
    check(machine, run)
    assert len(heard) == len(notes)
    hooked = scan_kernels.scan_forward_kernel.pre_run_hooks
    hooked.append(lambda *args, **options: heard.append('before'))
    try:
        assert noted(machine, run)[1]
        assert 'before' in heard
    finally:
        hooked.clear()
    check(machine, run)


def test_a_change_of_how_kernels_are_compiled(machine, monkeypatch):
    from triton.knobs import runtime

    run = both_passes(selective_scan, **inputs())
    check(machine, run)
    functions = machine.functions
    monkeypatch.setattr(runtime, 'debug', True)
    assert noted(machine, run)[1]
    assert machine.functions > functions
    monkeypatch.undo()


def test_another_current_device(machine, monkeypatch):
    """Launches happen on the device of the tensors, and leave the current one as it was."""
    run = both_passes(selective_scan, **inputs())
    check(machine, run)
    expected, _ = noted(machine, run)
    current, launch_here = [1], machine.launch

    def exchange(device):
        before, current[0] = current[0], device
        return before

    def launched(*arguments):
        assert current == [0]
        launch_here(*arguments)

    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: current[0])
    monkeypatch.setattr(torch.cuda, '_exchange_device', exchange)
    monkeypatch.setattr(torch.cuda, '_maybe_exchange_device', exchange)
    machine.notice = launched
    assert noted(machine, run) == (expected, 0)
    assert current == [1]


def test_another_stream(machine, monkeypatch):
    run = both_passes(selective_scan, **inputs())
    check(machine, run)
    machine.stream = 9
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 9)
    notes, through = noted(machine, run)  # a launch on stream 7 would fail the machine's assertion
    assert notes and through == 0


def test_a_triton_that_launches_in_another_way(machine, caplog):
    class Longer(machine.launcher_cls):
        def __init__(self, src, metadata):
            super().__init__(src, metadata)
            launch = self.launch
            self.launch = lambda *values: launch(*values[1:])

        def __call__(self, *values):
            self.launch('new', *values[:5], False, False, None, None, *values[5:])

    machine.launcher_cls = Longer
    run = both_passes(selective_scan, **inputs())
    with caplog.at_level(logging.WARNING):
        runs = [noted(machine, run) for _ in range(4)]
    assert all(through == len(notes) == 6 for notes, through in runs)
    assert all(notes == runs[0][0] for notes, _ in runs)
    assert len(caplog.records) == 1 and 'another way' in caplog.text
    watched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, '_launch_and_watch', lambda *_: watched.append(1))
        noted(machine, run)
    assert not watched  # it is left in peace afterwards


@pytest.mark.parametrize('mode', ['forward', 'both passes'])
def test_records_hold_no_tensors(mode, machine):
    """A record outlives its call; the memory of the call that it was made in goes back."""
    machine.arena.new_empty = lambda size: torch.empty(size)
    machine.arena.take = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    alive = []
    take = machine.launch

    def note(*arguments):
        alive.extend(weakref.ref(x) for x in arguments if isinstance(x, torch.Tensor))
        take(*arguments)

    machine.notice = note
    run = both_passes(selective_scan, **inputs())
    with torch.set_grad_enabled(mode == 'both passes'):
        for _ in range(4):
            run()
    del run
    gc.collect()
    assert len(alive) > 20 and triton_backend._CALLS
    assert not [x() for x in alive if x() is not None]


def test_two_threads_that_watch_one_kernel(machine):
    """Neither takes the other's watch for the launcher."""
    kernel, together = _Kernel(), threading.Barrier(2)
    found = []

    def watch():
        together.wait()
        found.append(launch._launch_and_watch(kernel, (1,), {}, kernel.compiled))

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[launcher for launcher, _ in seen] for _, seen in found] == [[kernel.launch]] * 2
    assert kernel.compiled.run.launch == kernel.launch


class _Kernel:
    """A kernel whose launches take a while."""

    def __init__(self):
        self.compiled = SimpleNamespace(run=SimpleNamespace(launch=self.launch))

    def launch(self, *values):
        time.sleep(0.1)

    def __getitem__(self, grid):
        return lambda: self.compiled.run.launch(*grid) or self.compiled


def test_a_change_between_the_first_two_runs(machine, monkeypatch, caplog):
    from triton.knobs import runtime

    run = both_passes(selective_scan, **inputs())
    run()
    monkeypatch.setattr(runtime, 'debug', True)
    runs = [noted(machine, run) for _ in range(4)]
    assert [bool(passed) for _, passed in runs] == [True, True, False, False]
    assert all(notes == runs[0][0] for notes, _ in runs) and not caplog.records


def test_the_environment_variable_leaves_launches_to_triton(machine, monkeypatch):
    run = both_passes(selective_scan, **inputs())
    monkeypatch.setenv('MMHYBRID_DIRECT_LAUNCH', '0')
    runs = [noted(machine, run) for _ in range(4)]
    assert all(passed == len(notes) > 0 for notes, passed in runs)
    assert all(notes == runs[0][0] for notes, _ in runs)
    triton_backend.forget()
    monkeypatch.setenv('MMHYBRID_DIRECT_LAUNCH', '1')
    check(machine, run)
    monkeypatch.setenv('MMHYBRID_DIRECT_LAUNCH', 'no')
    triton_backend.forget()
    with pytest.raises(ValueError, match='MMHYBRID_DIRECT_LAUNCH=no.*0 .*set one'):
        run()


def unready():
    """Contexts and tensors that only the registered operator may take, by name."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    plain = torch.randn(2, 3)
    yield 'a dispatch mode', Log(), plain
    yield 'fake tensors', FakeTensorMode(), None
    yield 'a subclass', contextlib.nullcontext(), plain.as_subclass(Own)
    yield 'forward mode', forward_ad.dual_level(), plain
    yield 'a negative view', contextlib.nullcontext(), torch._neg_view(plain)
    yield 'a sparse tensor', contextlib.nullcontext(), plain.to_sparse()


@pytest.mark.parametrize(('name', 'context', 'x'), list(unready()), ids=lambda x: x if
                         isinstance(x, str) else '')
def test_calls_that_only_the_operator_may_take(name, context, x):
    plain = torch.randn(2, 3)
    assert triton_backend.prepared((plain,) * 3, 'test') is not None
    with context:
        tensors = (plain, torch.randn(2, 3) if x is None else x, None)
        assert triton_backend.prepared(tensors, 'test') is None


def test_transforms_and_tracers_take_the_operator():
    seen = []

    def note(x):
        seen.append(triton_backend.prepared((x,), 'test'))
        return x.sum()

    torch.func.vmap(note)(torch.randn(2, 3))
    torch.func.grad(note)(torch.randn(3))
    torch.jit.trace(note, torch.randn(3), check_trace=False)
    assert seen == [None] * len(seen) and len(seen) >= 3


@pytest.mark.parametrize('transform', [torch.func.vmap, torch.func.functionalize])
def test_no_transform_meets_a_record(transform, machine):
    x = inputs(batch=1)
    u = x.pop('u')
    run = both_passes(selective_scan, u=u, **x)
    check(machine, run)
    assert triton_backend._CALLS
    given = u[None] if transform is torch.func.vmap else u
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend._Call, '__call__', lambda *_: pytest.fail('a record was used'))
        with contextlib.suppress(RuntimeError, NotImplementedError):
            transform(lambda u: selective_scan(u, **x, backend='triton'))(given)


@pytest.mark.parametrize('name', host.WORKS)
def test_every_call_that_host_py_measures_runs(name, machine, monkeypatch):
    for method, own in _NEW.items():
        monkeypatch.setattr(torch.Tensor, method, own)
    work = host.WORKS[name]('cpu')
    for _ in range(3):
        y = work.run()
        torch.autograd.grad(y, work.leaves, torch.ones_like(y), allow_unused=True)
    assert machine.notes


def test_threads_share_a_record(machine, monkeypatch):
    """Whoever comes first, every call launches once what it would alone, on its own tensors."""
    for method, own in _NEW.items():
        monkeypatch.setattr(torch.Tensor, method, own)
    given = [{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
             for _ in range(4)]
    together, failures = threading.Barrier(4), []

    def work(x):
        try:
            together.wait()
            for _ in range(5):
                selective_scan(**x, backend='triton')
        except Exception as error:  # shown by the assertion
            failures.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(machine.notes) == 4 * 5 * 2
    for x in given:
        assert sum(x['u'].data_ptr() in arguments for _, _, arguments in machine.notes) == 5 * 2
