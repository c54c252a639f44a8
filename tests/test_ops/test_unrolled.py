"""Kernels written out for Tritons without tuples: the same bits, and a refusal of what is unknown.

The cases that run kernels are in unrolled_cases.py.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from interpreter import run_cases

triton = pytest.importorskip('triton', reason='the kernels need Triton')

from mmhybrid.ops import unrolled  # noqa: E402
from mmhybrid.ops.selective_scan import launch  # noqa: E402

CASES = Path(__file__).parent / 'unrolled_cases.py'
OLD = tuple(int(x) for x in triton.__version__.split('.')[:2]) < unrolled.WITH_TUPLES
two_forms = pytest.mark.skipif(
    OLD or torch.cuda.is_available(), reason='the interpreter of Triton from 3.3 on compares'
)
names = itertools.count()


@two_forms
def test_same_bits():
    assert run_cases(CASES, '-m', 'not slow') >= 4


@pytest.mark.slow
@two_forms
def test_same_bits_in_chunks_and_of_mixers():
    assert run_cases(CASES, '-m', 'slow') >= 4


HEADER = 'import triton\nimport triton.language as tl\nSIX = tl.constexpr(6)\n\n'


@pytest.fixture
def written(tmp_path):
    """The source that is left of `a_kernel` of some source."""

    def write(source, types=None, **constants):
        path = tmp_path / f'kernels_{next(names)}.py'
        path.write_text(HEADER + source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return unrolled._Writer(module.a_kernel, constants, types or {}).source

    return write


def lines(text):
    return [line.strip() for line in text.strip().splitlines()][1:]


def test_loops_and_conditions_on_constants(written):
    source = written('''
@triton.jit
def a_kernel(p, N: tl.constexpr, FLAG: tl.constexpr):
    """What it does."""
    total = tl.load(p)
    for n in tl.static_range(N):
        if FLAG and n > 0:
            total += SIX * n
        elif not FLAG:
            total = total * 2 if n == N - 1 else total
    tl.store(p, total)
''', N=3, FLAG=True)
    assert lines(source) == [
        'total = tl.load(p)', 'total = total + 6', 'total = total + 12', 'tl.store(p, total)',
    ]
    assert source.startswith('def a_kernel(p):')


def test_tuples_through_a_loop(written):
    """Values that change places go through names of their own."""
    source = written("""
@triton.jit
def a_kernel(p, steps, N: tl.constexpr):
    x = ()
    for n in tl.static_range(N):
        x = x + (tl.load(p + n),)
    for i in range(0, steps):
        x = x[1:] + (x[0],)
    for n in tl.static_range(N):
        tl.store(p + n, x[n])
""", N=2)
    found = {}
    memory = [10, 20]
    language = type('tl', (), {
        'load': staticmethod(lambda at: memory[at]),
        'store': staticmethod(lambda at, x: memory.__setitem__(at, x)),
    })
    exec(source, {'tl': language}, found)
    found['a_kernel'](0, 3)
    assert memory == [20, 10]
    assert '(' not in ''.join(x for x in lines(source) if 'tl.' not in x and 'range' not in x)


def test_helpers_with_tuples(written):
    source = written("""
@triton.jit
def both(x, k, TWICE: tl.constexpr):
    if TWICE:
        x = x * 2
    return (x, x + k[1]), k[0]

@triton.jit
def a_kernel(p, TWICE: tl.constexpr):
    x = tl.load(p)
    k = (x, 5)
    x = x + 1
    y, z = both(x, k, TWICE)
    tl.store(p, y[0] + y[1] + z + x)
""", TWICE=True)
    for x in (3, 7):
        memory = [x]
        found = {}
        language = type('tl', (), {
            'load': staticmethod(lambda at, memory=memory: memory[at]),
            'store': staticmethod(lambda at, x, memory=memory: memory.__setitem__(at, x)),
        })
        exec(source, {'tl': language}, found)
        found['a_kernel'](0)
        twice = 2 * (x + 1)
        assert memory == [twice + (twice + 5) + x + (x + 1)]


def test_absent_pointers_are_constants(written):
    source = written("""
@triton.jit
def a_kernel(p, q):
    if q is not None:
        tl.store(q, 1)
    if p is not None:
        tl.store(p, 2)
""", q=None)
    assert source.startswith('def a_kernel(p):') and lines(source) == ['tl.store(p, 2)']


def test_conditions_on_types(written):
    source = """
@triton.jit
def twice(x, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:
        return x + x
    else:
        return x * 2

@triton.jit
def a_kernel(p, q):
    p += 1
    tl.store(q, twice(tl.load(p), p.dtype.element_ty))
"""
    assert 'x + x' in written(source, {'p': 'bfloat16'}).replace('_1', '')
    assert 'x * 2' in written(source, {'p': 'float32', 'q': 'bfloat16'}).replace('_1', '')
    moved = source.replace('p += 1', 'p = q')
    with pytest.raises(NotImplementedError):
        written(moved, {'p': 'bfloat16'})


@pytest.mark.parametrize(('body', 'problem'), [
    ('while n > 0:\n        n -= 1', 'While is not known'),
    ('x = [tl.load(p + i) for i in range(3)]', 'ListComp'),
    ('p.x = 3', 'an assignment to p.x'),
    ('x = (n, n)\n    tl.store(p, x[n])', 'x[n], a tuple at a place that is no constant'),
    ('x = ()\n    for i in range(0, n):\n        x = x + (i,)', 'a tuple that becomes longer'),
    ('for i in tl.static_range(n):\n        tl.store(p, i)', 'bounds that are no constants'),
    ('for i in range(0, n):\n        x = i\n    tl.store(p, x)', 'x, which may have no value here'),
    ('x = n + writes(p)', 'as it writes to memory'),
    ('x = leaves(p, n)', 'a return from within a loop or condition'),
    ('x = sorted((n, n))', None),
], ids=lambda x: str(x).split('\n')[0][:20])
def test_what_is_not_known_is_refused_by_name(written, body, problem):
    source = f"""
@triton.jit
def writes(p):
    tl.store(p, 1)
    return 2

@triton.jit
def leaves(p, n):
    if n > 1:
        return 1
    return 2

@triton.jit
def a_kernel(p, n):
    {body}
"""
    if problem is None:
        assert 'sorted((n, n))' in written(source)  # Triton's to refuse
        return
    with pytest.raises(NotImplementedError) as caught:
        written(source)
    assert problem in str(caught.value) and 'line ' in str(caught.value)


def test_new_tritons_keep_their_kernels(monkeypatch):
    kernels = {'a_kernel': object(), 'helper': object()}
    monkeypatch.setattr(triton, '__version__', '3.3.0')
    assert unrolled.for_this_triton(kernels) == {}
    monkeypatch.setattr(triton, '__version__', '3.2.0+git1')
    found = unrolled.for_this_triton(kernels)
    assert list(found) == ['a_kernel'] and found['a_kernel'].kernel is kernels['a_kernel']


def test_constants_choose_the_kernel():
    """True is 1 to a dictionary and another source to a kernel; absent pointers count, too."""
    from mmhybrid.ops.selective_scan import kernels

    carry = kernels.scan_carry_kernel
    if not isinstance(carry, unrolled.Unrolled):
        carry = unrolled.Unrolled(carry)
    x = torch.zeros(4)
    arguments = dict(
        p_state=x, p_sum=x, p_A=x, p_first=None, channels=1, n_chunks=2, n_blocks=1,
        N=1, BLOCK=32, LOG_ROWS=1, UNROLL=2, HAS_FIRST=False, BACKWARD=False, OVERLAP=False,
        num_warps=1,
    )
    first, left = carry.of(arguments)
    assert set(left) == {
        'p_state', 'p_sum', 'p_A', 'channels', 'n_chunks', 'n_blocks', 'num_warps'
    }
    assert first.fn.__name__ == 'scan_carry_kernel'
    assert carry.of(arguments)[0] is first
    assert carry.of(arguments | {'n_chunks': 9, 'p_A': x.clone()})[0] is first
    for other in ({'N': True}, {'N': 2}, {'p_first': x, 'HAS_FIRST': True}, {'BACKWARD': True}):
        assert carry.of(arguments | other)[0] is not first


@pytest.mark.parametrize(('version', 'ordinary'), [
    ('3.0.0', True), ('3.3.1', True), ('3.5.1', True), ('3.6.0', False), ('4.0.0', False),
])
def test_launchers_of_older_tritons_are_not_called_directly(monkeypatch, version, ordinary):
    monkeypatch.setattr(triton, '__version__', version)
    monkeypatch.delenv(launch.VARIABLE, raising=False)
    launch.unknown_launchers.cache_clear()
    try:
        assert launch.Program(None, ()).ordinary is ordinary
        assert (version in (launch.unknown_launchers() or '')) is ordinary
    finally:
        launch.unknown_launchers.cache_clear()
