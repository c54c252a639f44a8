"""Cases of sum and norm, run by test_layer_norm.py in a process of their own.

The kernels, compiled or interpreted (interpreter.py), against PyTorch in float64. The name of this
file keeps pytest from collecting it together with the other tests.
"""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from interpreter import DEVICE, begin_cases, generator
from scan_cases import assert_same
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmhybrid.layers import DropPath, LayerNorm, LayerNorm2d, RMSNorm, add_norm
from mmhybrid.ops import layer_norm as ops
from mmhybrid.ops.layer_norm import fused, norm_reference, sum_reference

begin_cases()
pytestmark = pytest.mark.gpu

SLOW = pytest.mark.slow
HALF, FLOAT, BF16 = torch.float16, torch.float32, torch.bfloat16
# The interpreter cuts numbers off instead of rounding them to bfloat16.
TOLERANCE = {FLOAT: 3e-6, HALF: 3e-3, BF16: 3e-2}


@contextlib.contextmanager
def launched(forward=1, backward=0):
    """The kernels run that often."""
    with contextlib.ExitStack() as stack:
        passes = [
            stack.enter_context(
                mock.patch.object(one, 'run', autospec=True, side_effect=one.run)
            ) for one in (fused.Forward, fused.Backward)
        ]
        yield
    assert [p.call_count for p in passes] == [forward, backward]


def inputs(size, x=FLOAT, branch=FLOAT, scale=None, factor=False, bias=True, weight=FLOAT):
    """Random inputs by name; None for what is absent."""
    numbers = generator(sum(size))

    def randn(dtype, *shape):
        return torch.randn(*shape, generator=numbers).to(dtype)

    channels = size[-1]
    return dict(
        residual=randn(x, *size) + 1,
        branch=None if branch is None else randn(branch, *size),
        scale=None if scale is None else randn(scale, channels),
        factor=torch.tensor([1.25, 0.0, 2.0])[torch.arange(size[0]) % 3] if factor else None,
        weight=randn(weight, channels),
        bias=randn(weight, channels) if bias else None,
    )


def kernels(residual, branch, weight, bias, dtype, scale, factor, rms):
    """Sum (None without a branch) and norm."""
    if branch is None:
        return None, ops.norm(residual, weight, bias, 1e-3, dtype, rms)
    return ops.add_norm(residual, branch, weight, bias, 1e-3, dtype, scale, factor, rms)


def expected(residual, branch, weight, bias, dtype, scale, factor, rms):
    """The same in float64."""
    total = residual if branch is None else sum_reference(residual, branch, scale, factor)
    out = norm_reference(total, weight, bias, 1e-3, rms=rms)
    return None if branch is None else total, out


def gradients(function, given, dtype, rms=False, frozen=(), unread=(), wide=False):
    """Outputs and gradients by name; ``wide`` computes in float64."""
    leaves = {}
    for name, x in given.items():
        if x is not None:
            x = (x.double() if wide else x).detach()
            x.requires_grad_(name not in ('factor', *frozen))
        leaves[name] = x
    pair = function(**leaves, dtype=dtype, rms=rms)
    found = {n: y for n, y in zip(('sum', 'norm'), pair, strict=True) if y is not None}
    wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
    used = [n for n in found if n not in unread and found[n].requires_grad]
    weights = [
        torch.randn(given['residual'].shape, generator=generator(len(n))).to(
            found[n].dtype if not wide else dtype or FLOAT).to(found[n].dtype) for n in used
    ]
    grads = torch.autograd.grad([found[n] for n in used], [*wanted.values()], weights,
                                allow_unused=True)
    found = {n: y.detach() for n, y in found.items()}
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        if not wide and grad is not None:
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, name
        found[f'gradient of {name}'] = grad
    return found


def check(given, dtype=None, tolerance=None, **options):
    """The kernels' results and gradients, against float64."""
    present = [x for x in given.values() if x is not None]
    least = max(TOLERANCE[x] for x in {t.dtype for t in present} | {dtype or FLOAT})
    with launched(1, 1):
        got = gradients(kernels, given, dtype, **options)
    want = gradients(expected, given, dtype, wide=True, **options)
    for name in want:  # an unread norm still has gradients of zero
        if want[name] is None and got[name] is not None:
            assert not got[name].any(), name
            want[name] = torch.zeros_like(got[name])
    assert_same(got, want, tolerance or least)
    return got


SIZES = [(1, 3, 2, 65), (9, 31), (1, 1, 1), *(
    pytest.param(size, marks=SLOW) for size in ((2, 5, 7), (3, 1, 8), (2, 33, 16)))]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('rms', [False, True], ids=['layer', 'rms'])
@pytest.mark.parametrize('form', ['norm', 'sum', 'all'])
def test_every_gradient(form, rms, size):
    if form == 'norm':
        given = inputs(size, branch=None, bias=not rms)
    else:
        scale = FLOAT if form == 'all' else None
        given = inputs(size, scale=scale, factor=form == 'all', bias=not rms)
    check(given, rms=rms, tolerance=2e-5 if size[-1] < 8 else None)


def test_many_tiles_in_a_row_and_a_last_program_with_less_to_do():
    with mock.patch.object(fused, 'processors', lambda _: 1):
        fused.forget()
        for batch, length in ((1, 35), (3, 17), (13, 1)):
            given = inputs((batch, length, 260), scale=FLOAT, factor=True)
            check(given, tolerance=1e-5)
            check(given | dict(factor=None, scale=None), tolerance=1e-5)
    fused.forget()


def test_2048_channels():
    check(inputs((1, 2, 2048), scale=FLOAT), tolerance=1e-5)


@pytest.mark.parametrize(('x', 'branch', 'scale'), [
    pytest.param(*one, marks=() if i % 5 == 3 else SLOW)
    for i, one in enumerate(itertools.product((HALF, FLOAT, BF16), (HALF, FLOAT, BF16),
                                              (None, FLOAT, HALF)))], ids=str)
def test_mixed_dtypes(x, branch, scale):
    given = inputs((2, 5, 24), x, branch, scale, factor=x != branch, weight=x)
    got = check(given, dtype=HALF if BF16 not in (x, branch) else BF16)
    promoted = sum_reference(*(given[n] for n in ('residual', 'branch', 'scale', 'factor'))).dtype
    assert got['sum'].dtype == promoted
    assert got['norm'].dtype == (HALF if BF16 not in (x, branch) else BF16)
    assert check(given)['norm'].dtype == promoted


def test_16_bits_are_the_rounded_float32():
    """What the next linear layer sees is what it would have cast the float32 norm to."""
    given = inputs((2, 64, 33), x=HALF, branch=HALF)
    for rms in (False, True):
        total, half = kernels(**given, dtype=HALF, rms=rms)
        same, full = kernels(**given, dtype=FLOAT, rms=rms)
        assert torch.equal(half, full.half()) and torch.equal(total, same)
        # and the sum is PyTorch's, which adds in float32 and rounds once
        assert torch.equal(total, given['residual'] + given['branch'])
        # the norm is that of the sum as it is stored
        assert torch.equal(half, ops.norm(total, given['weight'], given['bias'], 1e-3, rms=rms))


LAYOUTS = {
    'transposed': lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    'channels first': lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    'a slice of channels': lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    'every other channel': lambda x: torch.stack([x, x], -1)[..., 1],
    'every other token': lambda x: torch.stack([x, x], 2)[:, :, 1],
    'no common step': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'samples last': lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('of', [
    pytest.param('residual', marks=SLOW), pytest.param('branch', marks=SLOW), 'both'])
def test_layouts(of, layout):
    given = inputs((2, 3, 5, 10), scale=FLOAT)
    names = ('residual', 'branch') if of == 'both' else (of,)
    turned = given | {n: LAYOUTS[layout](given[n]) for n in names}
    got = check(turned)
    assert got['sum'].is_contiguous() and got['norm'].is_contiguous()
    plain = gradients(kernels, given, None)
    assert_same(got, plain, 2e-6)


@pytest.mark.parametrize('size', [(2, 16, 2, 24), (1, 7, 5, 3), (2, 1, 1, 96), (1, 4, 4, 1030)])
def test_channels_first_results(size):
    given = inputs(size)
    for layout in ('channels first', 'no common step', None):
        turned = given
        if layout:
            turned = given | {n: LAYOUTS[layout](given[n]) for n in ('residual', 'branch')}

        def function(residual, branch, weight, bias, dtype, scale, factor, rms):
            return ops.add_norm(residual, branch, weight, bias, 1e-3, dtype, scale, factor, rms,
                                channels_first=True)

        got = gradients(function, turned, None)
        for name in ('sum', 'norm'):
            assert got[name].movedim(-1, 1).is_contiguous()
        assert_same(got, gradients(expected, given, None, wide=True), 1e-5)
        if layout == 'channels first':  # convolutions get their gradient as they gave their map
            assert got['gradient of residual'].movedim(-1, 1).is_contiguous()


NAMES = ('residual', 'branch', 'scale', 'weight', 'bias')


@pytest.mark.parametrize('frozen', [
    ('residual',), ('branch',), ('scale',), ('weight', 'bias'), ('bias',), ('residual', 'branch'),
    ('scale', 'weight', 'bias'), ('branch', 'scale', 'weight', 'bias'), NAMES[:4],
    ('residual', 'scale', 'weight', 'bias'),
], ids='-'.join)
@pytest.mark.parametrize('plain', [False, pytest.param(True, marks=SLOW)])
def test_frozen_inputs(frozen, plain):
    given = inputs((2, 3, 17), scale=None if plain else FLOAT, factor=not plain)
    check(given, frozen=frozen)


@pytest.mark.parametrize('unread', ['sum', 'norm'])
@pytest.mark.parametrize('plain', [False, True])
def test_one_result_that_nothing_reads(unread, plain):
    given = inputs((2, 3, 17), scale=None if plain else FLOAT, factor=not plain)
    check(given, unread=(unread,))


def test_gradients_that_are_expanded():
    given = {n: x for n, x in inputs((2, 3, 4, 8), branch=None).items() if x is not None}
    leaves = [x.requires_grad_() for x in given.values()]
    for y in (ops.norm(*leaves, 1e-3), norm_reference(*leaves, 1e-3)):
        y.sum((1, 2)).square().sum().backward()
    for _ in range(2):
        found = []
        for function in (ops.norm, norm_reference):
            y = function(*leaves, 1e-3)
            found.append(torch.autograd.grad(y.sum((1, 2)).square().sum(), leaves))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e30])
def test_a_token_without_numbers_spoils_no_other(bad):
    given = inputs((2, 5, 11), scale=FLOAT)
    clean = gradients(kernels, given, None)
    given['branch'][1, 3, 4] = bad
    got, want = gradients(kernels, given, None), gradients(expected, given, None)
    for name in ('sum', 'norm', 'gradient of residual', 'gradient of branch'):
        other = torch.ones(2, 5, dtype=torch.bool)
        other[1, 3] = False
        assert torch.equal(got[name][other], clean[name][other]), name
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name


def test_the_same_bits_every_time():
    given = inputs((3, 65, 24), scale=FLOAT, factor=True)
    first, second = (gradients(kernels, given, HALF) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_nothing_is_kept_without_gradients():
    given = inputs((2, 3, 8))
    with torch.no_grad(), launched(1, 0), mock.patch.object(
        fused, '_apply', side_effect=AssertionError
    ):
        total, out = kernels(**given, dtype=None, rms=False)
    assert not total.requires_grad and not out.requires_grad
    leaf = given['residual'].requires_grad_()
    sizes = []

    def pack(x):
        sizes.append((x.data_ptr(), x.numel()))
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total, out = ops.add_norm(leaf, given['branch'], given['weight'], given['bias'], 1e-3)
    # the sum, two numbers for each token, and the weight
    assert sorted(n for _, n in sizes) == [8, 2 * 6, 48]
    assert total.data_ptr() in [p for p, _ in sizes]


class Spy(TorchDispatchMode):
    """Names of our operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if 'mmhybrid' in str(function):
            self.names.append(str(function).split('.')[1])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize('form', ['norm', 'sum', 'all', 'frozen'])
def test_the_operator_gives_the_same_bits(form):
    given = inputs((2, 5, 24), branch=None if form == 'norm' else HALF,
                   scale=FLOAT if form == 'all' else None, factor=form == 'all')
    frozen = ('branch', 'bias') if form == 'frozen' else ()
    eager = gradients(kernels, given, HALF, frozen=frozen)
    with Spy() as spy, launched(1, 1):
        seen = gradients(kernels, given, HALF, frozen=frozen)
    assert spy.names == ['add_norm', 'add_norm_backward']
    for name, x in eager.items():
        assert x.dtype == seen[name].dtype and torch.equal(x, seen[name]), name


@pytest.mark.parametrize('form', ['norm', 'sum', 'all', 'first'])
def test_fake_tensors_and_the_checks_of_operators(form):
    given = inputs((2, 5, 3, 24), branch=None if form == 'norm' else HALF,
                   scale=FLOAT if form == 'all' else None, factor=form == 'all')
    tensors = [given[n] for n in ('residual', 'branch', 'scale', 'factor', 'weight', 'bias')]
    first = form == 'first'
    if first:
        tensors[:2] = (LAYOUTS['channels first'](x) for x in tensors[:2])
    for t in (tensors[i] for i in (0, 1, 2, 4, 5)):
        if t is not None:
            t.requires_grad_()
    arguments = (*tensors, 1e-3, HALF, False, first)
    operator = torch.ops.mmhybrid.add_norm.default
    torch.library.opcheck(operator, arguments, test_utils=('test_schema', 'test_faketensor',
                          'test_autograd_registration'))
    real = [x.detach() for x in operator(*arguments)]
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
                          for t in arguments))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    total = tensors[0] if form == 'norm' else real[0]
    needs = [True, form != 'norm', form == 'all', True, True]
    backward = (real[1], None, total.detach(), real[2], tensors[1] if form == 'all' else None,
                *tensors[2:5], needs, FLOAT, HALF, False, True)
    torch.library.opcheck(torch.ops.mmhybrid.add_norm_backward.default, backward, test_utils=(
        'test_schema', 'test_faketensor'))


def test_a_second_derivative_is_refused():
    given = inputs((2, 3, 8), branch=None)
    x = given['residual'].requires_grad_()
    y = ops.norm(x, given['weight'], given['bias'], 1e-3)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='MMHYBRID_FUSED_NORM=0'):
        torch.autograd.grad(dx.sum(), x)


def test_a_sum_that_is_changed_before_the_backward_pass_is_noticed():
    given = inputs((2, 3, 8))
    total, out = ops.add_norm(given['residual'].requires_grad_(), given['branch'],
                              given['weight'], given['bias'], 1e-3)
    total.data.add_(0)  # not a change that autograd looks at
    with torch.no_grad():
        total.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_what_does_not_fit_is_refused():
    given = inputs((2, 3, 8))
    x, y, w, b = (given[n] for n in ('residual', 'branch', 'weight', 'bias'))
    for arguments in ((x, y[:1], w, b), (x, y, w[:4], b), (x, y, w, b[:4])):
        with pytest.raises(ValueError, match=r'expects branch like x .* got x \(2, 3, 8\)'):
            ops.add_norm(*arguments, 1e-3)
    for more in (dict(scale=w[:1]), dict(factor=w)):
        with pytest.raises(ValueError, match='expects branch like x'):
            ops.add_norm(x, y, w, b, 1e-3, **more)
    for bad, reason in ((x.double(), 'float64'), (x[0, 0], 'at least one token'), (x[:0], 'token'),
                        (torch.ones(2, 4097), 'up to 4096')):
        with pytest.raises(RuntimeError, match=reason):
            ops.norm(bad, torch.ones(bad.shape[-1]), None, 1e-3)


def test_the_environment_leaves_norms_to_pytorch(monkeypatch):
    norm = LayerNorm(8)
    x = torch.randn(2, 3, 8)
    with launched(1):
        fine = norm(x)
    monkeypatch.setenv(fused.VARIABLE, '0')
    with launched(0):
        assert torch.allclose(norm(x), fine, atol=1e-6)
        add_norm(x, x, norm)
    monkeypatch.setenv(fused.VARIABLE, 'no')
    with pytest.raises(ValueError, match='MMHYBRID_FUSED_NORM=no, and it may be 1'):
        norm(x)


# --- the layers -----------------------------------------------------------------------------------

MODULES = {
    'LayerNorm': (LayerNorm, (2, 3, 5, 12)),
    'RMSNorm': (RMSNorm, (2, 3, 12)),
    'LayerNorm2d': (LayerNorm2d, (2, 12, 3, 5)),
}


def module_of(kind, **options):
    """A norm with random parameters, and the size of what it takes."""
    make, size = MODULES[kind]
    module = make(12, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=generator(3))
    return module, size


def of_module(module, function, monkeypatch, kernel):
    """Results and gradients by name, with or without the kernels."""
    monkeypatch.setenv(fused.VARIABLE, str(int(kernel)))
    module.zero_grad()
    with launched(kernel, kernel):
        found = function()
        leaves = found.pop('leaves')
        sum(y.float().square().sum() * (i + 1) for i, y in enumerate(found.values())).backward()
    monkeypatch.delenv(fused.VARIABLE)
    found = {n: y.detach() for n, y in found.items()}
    named = dict(module.named_parameters()) | leaves
    return found | {f'gradient of {n}': x.grad for n, x in named.items()}


@pytest.mark.parametrize('feeds_linear', [False, True])
@pytest.mark.parametrize('kind', MODULES)
def test_modules_alone(kind, feeds_linear, monkeypatch):
    module, size = module_of(kind, feeds_linear=feeds_linear)
    names = {'weight'} if kind == 'RMSNorm' else {'weight', 'bias'}
    assert set(module.state_dict()) == names

    def run():
        x = torch.randn(size, generator=generator(1)).requires_grad_()
        return dict(y=module(x), leaves=dict(x=x))

    assert_same(*(of_module(module, run, monkeypatch, k) for k in (True, False)), 1e-5)
    for x in (torch.randn(size), torch.randn(size).to(memory_format=torch.channels_last)
              if len(size) == 4 else torch.randn(size).half()):
        with torch.autocast(DEVICE, HALF if DEVICE == 'cuda' else BF16), launched(1):
            y = module(x)
        wide = x.dtype if kind == 'RMSNorm' else FLOAT
        assert y.dtype == (torch.get_autocast_dtype(DEVICE) if feeds_linear else wide)
        assert y.is_contiguous()


def test_map_without_weight_or_bias():
    x = torch.randn(2, 12, 3, 5)
    with launched(0):
        y = LayerNorm2d(12, elementwise_affine=False)(x)
        total, z = add_norm(x, x, LayerNorm2d(12, elementwise_affine=False))
    module = LayerNorm2d(12, bias=False)
    with launched(1):
        torch.testing.assert_close(module(x), y)
    with launched(1):
        torch.testing.assert_close(add_norm(x, x, module), (total, z))


def test_map_in_channels_last():
    module, size = module_of('LayerNorm2d', channels_last=True)
    for form in (torch.contiguous_format, torch.channels_last):
        y = module(torch.randn(size).to(memory_format=form))
        assert y.is_contiguous(memory_format=torch.channels_last)
        total, y = add_norm(torch.randn(size), torch.randn(size), module)
        for z in (total, y):
            assert z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('drop', [
    pytest.param(None, marks=SLOW), 'identity', 'path', pytest.param('eval', marks=SLOW)])
@pytest.mark.parametrize('kind', MODULES)
def test_sum_and_norm(kind, drop, scaled, monkeypatch):
    module, size = module_of(kind)
    drop = {None: None, 'identity': nn.Identity(), 'path': DropPath(0.5),
            'eval': DropPath(0.5).eval()}[drop]

    def run():
        torch.manual_seed(6)
        x, y = (torch.randn(4, *size[1:], generator=generator(i)).requires_grad_() for i in (1, 2))
        scale = torch.randn(12, generator=generator(3)).requires_grad_() if scaled else None
        total, out = add_norm(x, y, module, scale, drop)
        leaves = dict(x=x, y=y) | (dict(scale=scale) if scaled else {})
        return dict(total=total, out=out, leaves=leaves)

    first, second = (of_module(module, run, monkeypatch, kernel) for kernel in (True, False))
    assert_same(first, second, 1e-5)
    dropped = (first['gradient of y'].flatten(1) == 0).all(1)
    assert dropped.any() == (isinstance(drop, DropPath) and drop.training) and not dropped.all()


def test_hooks_see_the_modules_and_other_modules_are_called():
    norm, x = LayerNorm(8), torch.randn(2, 3, 8)
    seen = []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with launched(1):
        total, out = add_norm(x, x, norm)
    assert len(seen) == 1 and seen[0][0] is total and seen[0][1] is out
    handle.remove()
    drop = nn.Dropout(1.0)
    total, out = add_norm(x, x, norm, drop=drop)
    assert torch.equal(total, x)
    with launched(0):
        total, out = add_norm(x, x, nn.LayerNorm(8))
    torch.testing.assert_close(out, norm(total))


def test_recomputed_blocks():
    norm, linear = LayerNorm(8), nn.Linear(8, 8)
    drop = DropPath(0.5)

    def block(x):
        return add_norm(x, linear(x), norm, drop=drop)

    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(0)
        x = torch.randn(6, 3, 8, generator=generator(0)).requires_grad_()
        total, out = run(x)
        (total.square().sum() + out.square().sum()).backward()
        found.append([total, out, x.grad, *(p.grad.clone() for p in norm.parameters())])
        norm.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
