"""Cases of the scans through order tables, run by test_walks_triton.py in a process of their own.

Mixers and operators on Triton's kernels, compiled or interpreted (interpreter.py), against the same
in float64 on reordered copies. The name of this file keeps pytest from collecting it together with
the other tests.
"""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, begin_cases, generator
from scan_cases import assert_same
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmhybrid.layers import DropPath, rotate
from mmhybrid.layers import rotated_sum as layer_rotated_sum
from mmhybrid.layers.mixers import directional, localvim, ss2d, vim
from mmhybrid.layers.mixers.localvim import LocalVimMixer
from mmhybrid.layers.mixers.ss2d import SS2D, LocalSS2D
from mmhybrid.layers.mixers.vim import VimMixer
from mmhybrid.models import LocalVim, Vim
from mmhybrid.ops.cross_scan import DIRECTIONS, cross_selective_scan, scan, scan_plan
from mmhybrid.ops.rotation import rotated_sum
from mmhybrid.ops.selective_scan import ordered, passes, triton_backend
from mmhybrid.ops.walk_conv import conv, walk_conv
from mmhybrid.ops.walk_scan import walk_scan

begin_cases()
pytestmark = pytest.mark.gpu

VMAMBA = ('h', 'v', 'h_flip', 'v_flip')


def compare(module, x, *rest, tolerance=2e-5):
    """Outputs and all gradients by name of a module on Triton, against itself in float64."""
    found = []
    for dtype, backend in ((torch.float32, 'triton'), (torch.float64, 'torch')):
        module = module.to(dtype)
        module.zero_grad()
        module.backend = backend
        image = x.detach().to(dtype).requires_grad_()
        y = module(image, *rest)
        weight = torch.randn(y.shape, generator=generator(1)).to(dtype)
        (y * weight).sum().backward()
        found.append({'y': y.detach(), 'gradient of x': image.grad} | {
            f'gradient of {name}': p.grad.clone() for name, p in module.named_parameters()
            if p.requires_grad})
    assert_same(*found, tolerance)


# --- one map in K directions ----------------------------------------------------------------------

CHOICES = [
    (('h',), (1, 1), True, 'exact'),
    (('v_flip',), (2, 3), False, 'released'),
    (('h', 'h_flip'), (2, 3), False, 'exact'),
    (('h_flip', 'v', 'w2'), (3, 3), True, 'exact'),
    (VMAMBA, (3, 2), True, 'exact'),
    (VMAMBA, (2, 3), True, 'released'),
    (('h', 'v', 'w2', 'w2_flip', 'h_flip'), (3, 2), False, 'exact'),
    (('w3_flip', 'h', 'v', 'w2', 'v_flip', 'h_flip'), (3, 4), True, 'exact'),
    ((*DIRECTIONS[:6], 'w3'), (2, 2), True, 'exact'),
    (('v', 'w7_flip'), (2, 3), False, 'exact'),
    pytest.param(DIRECTIONS, (3, 2), False, 'exact', marks=pytest.mark.slow),
]


def counted_scans():
    """Counts forward passes of the scan's kernels."""
    run = passes.Forward.run
    return mock.patch.object(passes.Forward, 'run', autospec=True, side_effect=run)


@pytest.mark.parametrize(('directions', 'size', 'merge', 'restore'), CHOICES,
                         ids=lambda c: f'{len(c)}-{c[-1]}' if isinstance(c, tuple) else str(c))
def test_cross_scan(directions, size, merge, restore):
    K, B, D, N, R, L = len(directions), 1, 3, 2, 2, size[0] * size[1]
    numbers = generator(K)

    def randn(*shape):
        return torch.randn(*shape, generator=numbers)

    inputs = dict(
        u=randn(B, D, L), x_proj=randn(K, R + 2 * N, D), dt_weight=randn(K, D, R),
        A=-0.1 - randn(K * D, N).abs(), D=randn(K * D), dt_bias=randn(K * D))
    weight = randn(B, K, D, L)
    plan = scan_plan(directions, *size, restore=restore)
    results = []
    for dtype, backend in ((torch.float32, 'triton'), (torch.float64, 'torch')):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        with mock.patch.object(scan, 'run_backend', wraps=scan.run_backend) as copies, \
                counted_scans() as kernels:
            y = cross_selective_scan(*leaves.values(), plan, merge=merge, backend=backend)
        assert kernels.call_count == (backend == 'triton')
        assert bool(copies.call_count) == (backend == 'torch')
        y = y if merge else torch.cat(y, 1)
        grads = torch.autograd.grad((y * (weight[:, 0] if merge else weight)).sum(),
                                    leaves.values())
        results.append(dict(zip(('y', *leaves), (y.detach(), *grads), strict=True)))
    assert_same(*results, 1e-5)


# --- the mixers -----------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [
    dict(channel_first=True), dict(channel_first=False, gate=True, conv_bias=True, state_dim=2)],
    ids=['current', 'gated'])
def test_ss2d(options):
    torch.manual_seed(0)
    shape = (2, 4, 2, 3) if options['channel_first'] else (1, 3, 2, 4)
    compare(SS2D(4, **options), torch.randn(shape))


@pytest.mark.parametrize('v_restore', ['exact', 'released'])
def test_local_ss2d(v_restore):
    torch.manual_seed(0)
    mixer = LocalSS2D(8, ('h', 'v_flip', 'w2', 'w3_flip'), state_dim=2, v_restore=v_restore)
    compare(mixer, torch.randn(1, 2, 3, 8))


@pytest.mark.parametrize(('attention', 'fused'),
                         [('channel', 1), ('channel-spatial', 0), ('none', 0)])
def test_forms_of_attention_over_directions(attention, fused):
    """The published one in one kernel, the others in layers behind the scan's."""
    torch.manual_seed(0)
    mixer = LocalSS2D(8, ('h', 'v_flip', 'w2'), attention=attention, state_dim=1)
    with mock.patch.object(ss2d, 'attend_norm', wraps=ss2d.attend_norm) as one_kernel, \
            mock.patch.object(ss2d, 'map_conv', wraps=ss2d.map_conv) as convolution, \
            counted_scans() as kernels:
        compare(mixer, torch.randn(1, 2, 3, 8))
    assert one_kernel.call_count == fused
    assert convolution.call_count == kernels.call_count == 1


@pytest.mark.parametrize('attention', ['channel', 'channel-spatial'])
def test_search_for_directions(attention):
    """All (here three) under learned weights: layers behind one call of the scan's kernels."""
    torch.manual_seed(0)
    with mock.patch.object(ss2d, 'DIRECTIONS', ('h', 'v_flip', 'w2')):
        mixer = LocalSS2D(8, None, attention=attention, state_dim=1)
    with torch.no_grad():
        mixer.multi_scan.weights.normal_()
    with mock.patch.object(ss2d, 'attend_norm', side_effect=AssertionError), \
            counted_scans() as kernels:
        compare(mixer, torch.randn(1, 2, 3, 8))
    assert kernels.call_count == 1


@pytest.mark.parametrize('divide', [True, False])
def test_vim(divide):
    torch.manual_seed(0)
    mixer = VimMixer(6, state_dim=3, divide=divide)
    with mock.patch.object(vim, 'walk_scan', wraps=walk_scan) as whole, \
            counted_scans() as kernels:
        compare(mixer, torch.randn(1, 11, 6))
    assert whole.call_count == kernels.call_count == 1


LOCAL = ('h', 'v_flip', 'w2_flip', 'w3')


@pytest.mark.parametrize(('directions', 'size', 'class_token', 'v_restore'), [
    (LOCAL, (2, 3), False, 'exact'),
    (LOCAL, (3, 2), False, 'released'),
    (LOCAL, (3, 3), True, 'exact'),
    (('h_flip', 'v', 'w2'), (2, 4), False, 'exact'),
    pytest.param(LOCAL, (3, 5), False, 'exact', marks=pytest.mark.slow),
    pytest.param(LOCAL, (3, 4), False, 'released', marks=pytest.mark.slow),
    # the search walks through windows of 7, whatever the map
    pytest.param(None, (2, 2), False, 'exact', marks=pytest.mark.slow),
])
def test_localvim(directions, size, class_token, v_restore):
    torch.manual_seed(0)
    mixer = LocalVimMixer(8, directions, state_dim=2, class_token=class_token, v_restore=v_restore)
    with mock.patch.object(localvim, 'walk_scan', wraps=walk_scan) as whole, \
            counted_scans() as kernels:
        compare(mixer, torch.randn(1, size[0] * size[1] + class_token, 8), size)
    assert whole.call_count == kernels.call_count == 1


class Trunk(torch.nn.Module):
    """Maps of a small plain backbone, laid side by side."""

    def __init__(self, build, **options):
        super().__init__()
        self.model = build(dict(dim=8, depth=2, state_dim=2), img_size=32, out_indices=(0, 1),
                           drop_path_rate=0., in_channels=2, **options)

    @property
    def backend(self):
        """Of all mixers."""
        return {block.mixer.backend for block in self.model.layers}

    @backend.setter
    def backend(self, name):
        for block in self.model.layers:
            block.mixer.backend = name

    def forward(self, x):
        return torch.cat(self.model(x), 1)


LISTS = [['h', 'v_flip'], ['w2', 'h_flip']]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(('build', 'options'), [
    (Vim, dict(feature='mixer', with_cp=True)),
    (Vim, dict(class_token='middle', frozen_stages=1)),
    (LocalVim, dict(directions=LISTS)),
    pytest.param(Vim, dict(feature='mixer'), marks=SLOW),
    pytest.param(Vim, dict(class_token='first', divide=False), marks=SLOW),
    pytest.param(Vim, dict(rope=True, last='add_norm'), marks=SLOW),
    pytest.param(LocalVim, dict(directions=LISTS, norm='rms', rope=False, with_cp=True),
                 marks=SLOW),
], ids=lambda value: '-'.join(map(str, value)) if isinstance(value, dict) else value.__name__)
def test_plain_backbones(build, options):
    torch.manual_seed(0)
    trunk = Trunk(build, **options, **dict(pyramid=False) if build is Vim else {})
    module = vim if build is Vim else localvim
    with mock.patch.object(module, 'walk_scan', wraps=walk_scan) as whole:
        compare(trunk, torch.randn(1, 2, 20, 33), tolerance=1e-4)
    assert whole.call_count == 2 * (1 + options.get('with_cp', False))


def test_a_known_call_chooses_its_backend_once():
    torch.manual_seed(0)
    for module, mixer, x in (
            (ss2d, SS2D(4, channel_first=True, backend='triton'), torch.randn(1, 4, 2, 3)),
            (directional, VimMixer(4, state_dim=1, backend='triton'), torch.randn(1, 5, 4))):
        expected = mixer(x)
        with mock.patch.object(module, 'choose_backend', wraps=module.choose_backend) as choose, \
                mock.patch.object(ordered, 'choose_backend', side_effect=AssertionError):
            y = mixer(x)
        assert choose.call_count == 1 and torch.equal(y, expected)


def test_no_images():
    for mixer, rest in ((LocalVimMixer(8, ('h', 'w2'), state_dim=1), ((2, 3),)),
                        (VimMixer(8, state_dim=1), ())):
        mixer.backend = 'triton'
        with mock.patch.object(directional, 'walk_conv', wraps=walk_conv) as convolution:
            y = mixer(torch.zeros(0, 6, 8), *rest)
        assert convolution.call_count == 1 and y.shape == (0, 6, 8)
        y.sum().backward()
        for name, p in mixer.named_parameters():
            assert not p.grad.any(), name


def test_half_precision():
    """Mixed precision: bfloat16 between the projections, against float32 on copies."""
    torch.manual_seed(0)
    for mixer, x, rest in ((SS2D(8, channel_first=True), torch.randn(1, 8, 2, 3), ()),
                           (VimMixer(8, state_dim=2), torch.randn(1, 6, 8), ()),
                           (LocalVimMixer(8, LOCAL, state_dim=2), torch.randn(1, 6, 8), ((2, 3),))):
        mixer.backend = 'torch'
        expected = mixer(x, *rest)
        mixer.backend = 'triton'
        with torch.autocast(DEVICE, torch.bfloat16):
            y = mixer(x, *rest)
        # the interpreter cuts off where a GPU rounds
        assert_same({'y': y}, {'y': expected}, 0.06)
        y.float().sum().backward()
        for name, p in mixer.named_parameters():
            assert bool(torch.isfinite(p.grad).all()), name


# --- the convolution ------------------------------------------------------------------------------


def conv_inputs(directions, size, channels=3, taps=4, dtype=torch.float32):
    plan = scan_plan(directions, *size)
    numbers = generator(0)

    def randn(*shape):
        return torch.randn(*shape, generator=numbers).to(dtype)

    K, L = len(directions), plan.num_tokens
    return [randn(2, L, channels).mT, randn(K, channels, taps), randn(K, channels)], plan


def conv_reference(u, weight, bias, plan):
    results = []
    for k, order in enumerate(plan.permutation().long()):
        row = F.pad(u, (0, len(order) - u.shape[2]))[..., order]
        row = F.pad(row, (weight.shape[2] - 1, 0))
        y = F.silu(F.conv1d(row, weight[k][:, None], bias[k], groups=u.shape[1]))
        results.append(torch.zeros_like(y).index_copy(-1, order, y))
    return torch.stack(results, 1)


@pytest.mark.parametrize(('directions', 'size', 'channels', 'taps'), [
    (('h', 'h_flip'), (1, 40), 65, 4), (('v', 'w2', 'w7_flip'), (3, 5), 3, 4),
    (('v_flip',), (13, 11), 2, 3), (('w2',), (1, 1), 1, 1)])
def test_walk_conv(directions, size, channels, taps):
    tensors, plan = conv_inputs(directions, size, channels, taps)
    leaves = [x.requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    y = walk_conv(*leaves, plan.permutation(), plan.inverse_permutation())
    expected = conv_reference(*exact, plan)
    assert y.permute(1, 0, 3, 2).is_contiguous()
    weight = torch.randn(y.shape, generator=generator(2))
    results = []
    for result, inputs in ((y, leaves), (expected, exact)):
        grads = torch.autograd.grad((result * weight).sum(), inputs)
        results.append(dict(zip(('y', 'u', 'weight', 'bias'), (result, *grads), strict=True)))
    assert_same(*results, 1e-5)  # the slope of the SiLU is a difference, and may nearly vanish


def test_walk_conv_is_an_operator():
    tensors, plan = conv_inputs(('h', 'w2_flip'), (2, 3), taps=2)
    arguments = (*(x.requires_grad_() for x in tensors), plan.permutation(),
                 plan.inverse_permutation())
    torch.library.opcheck(torch.ops.mmhybrid.walk_conv.default, arguments)
    y = walk_conv(*arguments)
    plain = [x.detach() for x in (torch.ones_like(y), *arguments)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = torch.ops.mmhybrid.walk_conv_backward(*plain)
    # compiled code relies on the layouts that the fakes announce
    for found, fake in zip(torch.ops.mmhybrid.walk_conv_backward(*plain), fakes, strict=True):
        assert (found.stride(), found.dtype) == (fake.stride(), fake.dtype)
    (du,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match='first derivative only'):
        du.sum().backward()
    with pytest.raises(ValueError, match=r'weight \(K, E, T\).*got \(2, 3, 6\), \(1, 3, 2\)'):
        walk_conv(tensors[0], tensors[1][:1], *arguments[2:])


@pytest.mark.parametrize('odd', [False, True])
def test_calls_give_the_bits_of_the_operators(odd):
    tensors, plan = conv_inputs(('h', 'w2_flip'), (2, 3), dtype=torch.bfloat16)
    tables = [plan.permutation(), plan.inverse_permutation()]
    if odd:  # every other number of something
        tensors[1:], tables = (
            [torch.stack([x, x], -1)[..., 0] for x in given] for given in (tensors[1:], tables)
        )
    tensors = [x.requires_grad_() for x in tensors]

    def results():
        y = walk_conv(*tensors, *tables)
        weight = torch.randn(y.shape, generator=generator(2)).to(y.dtype)
        return y, *torch.autograd.grad(y, tensors, weight)

    got = results()
    with mock.patch.object(conv.launch, 'describe', lambda tensors: None), \
            mock.patch.object(conv._Call, '__call__', lambda *_: pytest.fail('a record')):
        expected = results()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.isfinite().all()
    odd_plan = [plan.permutation(), plan.inverse_permutation()]
    assert torch.equal(walk_conv(*tensors, *odd_plan), got[0])


def test_walk_conv_saves_what_a_hook_changes():
    tensors, plan = conv_inputs(('h', 'w2_flip'), (3, 3))
    tensors = [x.requires_grad_() for x in tensors]

    def grads():
        y = walk_conv(*tensors, plan.permutation(), plan.inverse_permutation())
        return torch.autograd.grad(y.sum(), tensors)

    def unpack(given):
        return torch.stack([given, given], -1)[..., 0]

    expected = grads()
    with torch.autograd.graph.saved_tensors_hooks(lambda given: given, unpack):
        got = grads()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- the turned sum -------------------------------------------------------------------------------


def turned_inputs(has_stream=True, has_factor=True, dtype=torch.float32):
    numbers = generator(3)
    stream, hidden = torch.randn(2, 3, 5, 70, generator=numbers)
    factor = torch.tensor([0., 1.25, 1.25]) if has_factor else None
    cos, sin = torch.randn(2, 5, 70, generator=numbers)  # any tables, not of one angle a pair
    hidden = hidden.to(dtype).requires_grad_()
    return (stream.requires_grad_() if has_stream else None), hidden, factor, cos, sin


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(('has_stream', 'has_factor'),
                         [(True, True), (True, False), (False, False)])
def test_rotated_sum(has_stream, has_factor, dtype):
    stream, hidden, factor, cos, sin = turned_inputs(has_stream, has_factor, dtype)
    y = rotated_sum(stream, hidden, factor, cos, sin)
    assert y.dtype == torch.float32 and y.is_contiguous()
    added = hidden.double() * (1 if factor is None else factor[:, None, None])
    expected = rotate(added if stream is None else added + stream, cos.double(), sin.double())
    weight = torch.randn(y.shape, generator=generator(4))
    leaves = [x for x in (stream, hidden) if x is not None]
    for x, z in zip(torch.autograd.grad(y, leaves, weight),
                    torch.autograd.grad(expected, leaves, weight.double()), strict=True):
        assert x.dtype == z.dtype
        # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(x, z, atol=1e-5, rtol=2e-2 if x.dtype != y.dtype else 1e-5)
    torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)


def test_rotated_sum_is_an_operator():
    tensors = turned_inputs()
    torch.library.opcheck(torch.ops.mmhybrid.rotated_sum.default, tensors)
    torch.library.opcheck(torch.ops.mmhybrid.rotated_sum.default, turned_inputs(False, False))
    y = rotated_sum(*tensors)
    (dhidden,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match='first derivative only'):
        dhidden.sum().backward()


def test_rotated_sum_of_a_layer_draws_its_own_factors():
    stream, hidden, _, cos, sin = turned_inputs()
    for drop, factor in ((nn.Identity(), None), (DropPath(0.5).eval(), None), (None, None),
                         (torch.tensor([2., 0., 2.]), torch.tensor([2., 0., 2.]))):
        y = layer_rotated_sum(stream, hidden, drop, cos, sin)
        assert torch.equal(y, rotated_sum(stream, hidden, factor, cos, sin))
    y = layer_rotated_sum(stream, hidden, DropPath(0.5), cos, sin)
    assert any(torch.equal(y[0], rotated_sum(stream, hidden, torch.full((3,), f), cos, sin)[0])
               for f in (0., 2.))


# --- what is materialised -------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of every storage that appears, by operator."""

    def __init__(self):
        super().__init__()
        self.seen, self.found = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # what exists already is not made here, whoever gives a view of it
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self.seen.add(x.untyped_storage()._cdata)
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.found.append((str(function), storage.nbytes(), storage))
        return out

    def rows(self, unit):
        """Sizes of what was allocated, in units of one sequence (B, D, L), by operator."""
        return [(name, nbytes / unit) for name, nbytes, _ in self.found if nbytes >= 0.9 * unit]


@pytest.fixture
def checked(monkeypatch):
    """What the launcher of the scan would copy if it lay badly in memory; that fails."""
    lanes, seen = passes.lanes, []
    triton_backend.forget()

    def without_copy(x):
        seen.append(x)
        assert lanes(x) is x
        return x

    monkeypatch.setattr(passes, '_COPY_ABOVE', 0)
    monkeypatch.setattr(passes, 'lanes', without_copy)
    yield seen
    triton_backend.forget()


@pytest.mark.parametrize('mixer', [
    LocalVimMixer(4, ('h', 'v_flip', 'w2'), state_dim=1, backend='triton'),
    VimMixer(4, state_dim=1, backend='triton')],
    ids=['overhanging windows', 'vim'])
def test_no_copy_in_the_backward_pass(mixer, checked):
    mixer(torch.randn(2, 6, 4), (2, 3)).square().sum().backward()
    assert len(checked) == 3 + 4  # of the forward pass; the same and the gradient of the result


@pytest.mark.parametrize('family', ['ss2d', 'vim', 'localvim'])
def test_no_copy_per_direction(family, checked):
    """What a forward pass makes that is as large as a sequence: results, and no reordered copy."""
    torch.manual_seed(0)
    if family == 'ss2d':
        D, L = 32, 24
        u, rank, N = torch.randn(1, D, L), 2, 1
        plan = scan_plan(VMAMBA, 4, 6)
        weights = (torch.randn(4, rank + 2 * N, D), torch.randn(4, D, rank),
                   -torch.rand(4 * D, N), torch.randn(4 * D), torch.randn(4 * D))

        def run(backend):
            return cross_selective_scan(u, *weights, plan, backend=backend)

        # u with channels side by side, the steps and the results of four directions, their sum
        expected = [('clone', 1), ('bmm', 4), ('selective_scan_triton', 4), ('sum', 1)]
    else:
        D, L = 64, 24
        cls, K = (VimMixer, 2) if family == 'vim' else (LocalVimMixer, 4)
        options = {} if family == 'vim' else dict(directions=('h', 'v', 'w2', 'v_flip'))
        mixer = cls(D // 2, state_dim=1, dt_rank=1, **options)
        u, z = torch.randn(2, 1, L, D).mT
        branches = mixer.branches()
        plan = scan_plan(mixer.directions, 4, 6)

        def run(backend):
            gate = None if family == 'vim' else z
            return directional.scan_branches(u, branches, plan, z=gate, backend=backend)

        expected = [('walk_conv', K), ('bmm', K), ('selective_scan_triton', K)]
    with torch.no_grad():
        plan.scan_order(), plan.permutation(), plan.inverse_permutation()
        found = {}
        for backend in ('triton', 'torch'):
            with Allocations() as allocations:
                run(backend)
            found[backend] = allocations.rows(D * L * 4)
    made = [(name.split('.')[1], size) for name, size in found['triton']
            if name.split('.')[1] not in ('stack', 'cat')]  # of weights
    assert [name for name, _ in made] == [name for name, _ in expected], made
    for (name, size), (_, units) in zip(made, expected, strict=True):
        assert size == pytest.approx(units), name
    assert len(checked) == 3  # u, the step and the gate of the one call
    gathered = sum(size for name, size in found['torch'] if 'reorder' in name or 'gather' in name)
    assert gathered > 0 or family == 'vim'  # the twin does copy
