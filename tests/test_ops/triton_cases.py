"""Cases of the Triton scan, run by test_selective_scan_triton.py in a process of their own.

They run compiled with a GPU and interpreted without one (interpreter.py). The name of this file
keeps pytest from collecting it together with the other tests.
"""

import itertools

import pytest
import torch
from interpreter import begin_cases, generator

from mmhybrid.ops import selective_scan
from mmhybrid.ops.selective_scan import passes, triton_backend
from mmhybrid.ops.selective_scan.ordered import selective_scan_ordered
from mmhybrid.ops.selective_scan.reference import selective_scan_reference

begin_cases()
pytestmark = pytest.mark.gpu

FACTORS = {
    'length': (7, 21, 2, 64, 1),
    'state': (8, 1, 5, 16),
    'dtype': (torch.float32, torch.bfloat16, torch.float16),
    'layout': ('token', 'channel', 'mixed'),
    'order': (None, 'shared', 'per group', 'with holes'),
    'chunk': (0, 8, 20),  # 0: what the model of the launch plans chooses
    'group_dim': (3, 33),  # one ragged block, and a full block with a ragged one
    'groups': (1, 2),
    'reverse': (False, True),
    'skip': (True, False),
    'gate': (False, True),
    'bias': (True, False),
    'softplus': (True, False),
    'last': (True, False),  # whether the last state has a gradient
}
# The interpreter cuts off where a GPU rounds, so one unit in the last place, not half of one.
STORED = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


def pairwise(factors):
    """Cases in which every value of every factor meets every value of every other factor."""
    names = list(factors)
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    while missing:
        case = dict(min(missing, key=sorted))
        for name in names:
            if name not in case:
                gains = [
                    sum(frozenset([(name, i), x]) in missing for x in case.items())
                    for i in range(len(factors[name]))
                ]
                case[name] = gains.index(max(gains))
        missing -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        yield {name: factors[name][case[name]] for name in names}


def product(factors):
    """The cases of the slow run: all of length x state x dtype x order x reverse x chunk."""
    full = ('length', 'state', 'dtype', 'order', 'reverse', 'chunk')
    rest = {name: values for name, values in factors.items() if name not in full}
    others = list(pairwise(rest))
    for i, values in enumerate(itertools.product(*(factors[name] for name in full))):
        yield dict(zip(full, values, strict=True)) | others[i % len(others)]


def case_id(case):
    on = [name for name, value in case.items() if value is True]
    dtype = str(case['dtype']).removeprefix('torch.')
    sizes = f'L{case["length"]}-N{case["state"]}-G{case["groups"]}-H{case["group_dim"]}'
    order = (case['order'] or 'row').replace(' ', '_')
    return '-'.join([sizes, dtype, case['layout'], order, f'chunk{case["chunk"]}', *on])


def make_inputs(case, seed=0):
    """The eight inputs in the dtypes of a mixed-precision model; absent ones are None."""
    numbers = generator(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=numbers)

    batch, groups, group_dim = case.get('batch', 1), case['groups'], case['group_dim']
    channels, tokens, state = groups * group_dim, case['length'], case['state']
    delta = randn(batch, channels, tokens)
    inputs = {
        'u': randn(batch, channels, tokens),
        'delta': delta if case['softplus'] else 0.5 * delta.abs(),
        'A': -0.05 - 2 * torch.rand(channels, state, generator=numbers),
        'B': randn(batch, groups, state, tokens),
        'C': randn(batch, groups, state, tokens),
        'D': randn(channels) if case['skip'] else None,
        'z': randn(batch, channels, tokens) if case['gate'] else None,
        'delta_bias': 0.3 * randn(channels).abs() if case['bias'] else None,
    }
    for i, name in enumerate(('u', 'B', 'delta', 'C', 'z')):
        if inputs[name] is not None:
            x = inputs[name].to(case['dtype'])
            if case['layout'] == 'token' or (case['layout'] == 'mixed' and i % 2 == 0):
                x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
            inputs[name] = x
    return inputs


def make_order(case):
    """An int32 table (1, L') or (G, L'); holes are places of the sequence without a token."""
    if case['order'] is None:
        return None
    numbers = generator(1)
    rows = case['groups'] if case['order'] == 'per group' else 1
    holes = 2 if case['order'] == 'with holes' else 0
    table = [torch.randperm(case['length'] + holes, generator=numbers) for _ in range(rows)]
    table = torch.stack(table).int()
    return torch.where(table < case['length'], table, -1)


def ordered_reference(inputs, order, softplus, reverse):
    """The reference on copies in the order of visit, its result put back."""
    if order is None:
        return selective_scan_reference(*inputs, softplus, reverse)
    u, delta, A, B, C, D, z, bias = inputs
    groups, tokens = B.shape[1], u.shape[-1]
    group_dim = u.shape[1] // groups
    ys, lasts = [], []
    for g in range(groups):
        row = order[g if len(order) > 1 else 0].long()
        live = (row >= 0).to(u.dtype)
        take = lambda x: x[..., row.clamp_min(0)] * live  # noqa: E731, B023
        d = slice(g * group_dim, (g + 1) * group_dim)
        pick = lambda x: None if x is None else x[d]  # noqa: E731, B023
        z_g = None if z is None else take(z[:, d])
        y, last = selective_scan_reference(
            take(u[:, d]), take(delta[:, d]), A[d], take(B[:, g : g + 1]), take(C[:, g : g + 1]),
            pick(D), z_g, pick(bias), softplus, reverse,
        )
        place = torch.full((tokens,), -1)
        place[row[row >= 0]] = torch.nonzero(row >= 0)[:, 0]
        ys.append(y[..., place])
        lasts.append(last)
    return torch.cat(ys, 1), torch.cat(lasts, 1)


def run_triton(inputs, order, case, chunk):
    """Through the (B, G, H, L) entry, which takes the chunk size and an order."""
    groups = case['groups']
    shaped = {
        name: x.unflatten(1, (groups, case['group_dim']))
        if name in ('u', 'delta', 'z') and x is not None
        else x
        for name, x in inputs.items()
    }
    y, last = triton_backend.scan_grouped(
        *shaped.values(), order, case['softplus'], case['reverse'], chunk
    )
    return y.flatten(1, 2), last


def assert_close(name, got, expected, tolerance):
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape, f'{name}: {tuple(got.shape)}, not {tuple(expected.shape)}'
    assert got.isfinite().all(), f'{name}: {int((~got.isfinite()).sum())} values are not finite'
    error = got - expected
    scale = expected.square().mean().sqrt()
    rms = error.square().mean().sqrt()
    assert rms <= tolerance * scale, f'{name}: RMS {rms / scale:.1e} of the reference'
    worst, largest = error.abs().max(), expected.abs().max()
    assert worst <= 4 * tolerance * largest, f'{name}: maximum {worst / largest:.1e}'


def check_case(case):
    inputs, order = make_inputs(case), make_order(case)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs.values()]
    y_exact, last_exact = ordered_reference(exact, order, case['softplus'], case['reverse'])
    numbers = generator(2)
    dy = torch.randn(y_exact.shape, generator=numbers).to(case['dtype'])
    dlast = torch.randn(last_exact.shape, generator=numbers) * case['last']
    wanted = [x for x in exact if x is not None]
    grads_exact = torch.autograd.grad(
        (y_exact, last_exact), wanted, (dy.double(), dlast.double()), allow_unused=True
    )

    inputs = {k: x if x is None else x.requires_grad_() for k, x in inputs.items()}
    y, last = run_triton(inputs, order, case, case['chunk'])
    outputs, seeds = ((y, last), (dy, dlast)) if case['last'] else ((y,), (dy,))
    present = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(outputs, list(present.values()), seeds)

    assert y.dtype == case['dtype'] and last.dtype == torch.float32
    # Whatever the dtype of the tokens, the arithmetic and everything stored in float32 is exact.
    assert_close('y', y, y_exact.detach(), STORED[case['dtype']])
    assert_close('last state', last, last_exact.detach(), STORED[torch.float32])
    for (name, x), grad, expected in zip(present.items(), grads, grads_exact, strict=True):
        assert grad.dtype == x.dtype
        expected = torch.zeros_like(x) if expected is None else expected
        # Sums over tokens cancel, and their error is that of the terms.
        cancels = 3 if name in ('A', 'D', 'delta_bias') else 1
        assert_close(f'gradient of {name}', grad, expected, cancels * STORED[x.dtype])


CASES = list(pairwise(FACTORS))


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_pairwise(case):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize('case', list(product(FACTORS)), ids=case_id)
def test_product(case):
    check_case(case)


SMALL = {
    'length': 13, 'state': 3, 'dtype': torch.float32, 'layout': 'token', 'order': None,
    'group_dim': 4, 'groups': 1, 'reverse': False, 'skip': True, 'gate': True, 'bias': True,
    'softplus': True, 'batch': 2,
}


def gradients(case, chunk=0):
    inputs = {k: x if x is None else x.requires_grad_() for k, x in make_inputs(case).items()}
    y, last = run_triton(inputs, make_order(case), case, chunk)
    present = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(y.square().sum() + last.sum(), list(present.values()))
    return {'y': y.detach(), 'last state': last.detach()} | dict(zip(present, grads, strict=True))


def test_chunks_do_not_change_the_result():
    whole = gradients(SMALL, chunk=16)
    for chunk in (4, 12):
        for name, x in gradients(SMALL, chunk).items():
            assert_close(f'{name} at chunk {chunk}', x, whole[name], 5e-7)


def test_the_last_sweep_carries_a_few_chunks_and_a_kernel_more(monkeypatch):
    """What follows from the states at the starts of the chunks is the same."""
    results = []
    for few in (1, 16):
        triton_backend.forget()
        monkeypatch.setattr(passes, '_FEW_CHUNKS', few)
        results.append(gradients(SMALL | {'batch': 1}, chunk=4))
    triton_backend.forget()
    for name, x in results[0].items():
        assert_close(name, results[1][name], x, 5e-7)


@pytest.mark.parametrize('backward', [False, True])
def test_carry(backward):
    """Chunks for all rows of a program, with and without a state before them.

    Nothing follows the chunk that is visited last, so what it adds is not there.
    """
    from mmhybrid.ops.selective_scan.kernels import scan_carry_kernel

    numbers, rows = generator(6), set()
    for n_chunks, channels, state, first in (
        (1, 5, 2, False), (8, 33, 1, True), (23, 4, 3, False), (70, 33, 1, True),
    ):
        states = torch.randn(2, n_chunks, state, channels, generator=numbers)
        sums = 0.3 * torch.rand(2, n_chunks, channels, generator=numbers)
        last = 0 if backward else n_chunks - 1
        states[:, last], sums[:, last] = torch.nan, torch.nan
        A = -torch.rand(channels, state, generator=numbers)
        h = torch.randn(2, channels, state, generator=numbers) * first
        given, expected = h.clone() if first else None, torch.empty_like(states)
        for c in range(n_chunks)[:: -1 if backward else 1]:
            expected[:, c] = h.mT
            h = torch.exp(A * sums[:, c, :, None]) * h + states[:, c].mT
        blocks = -(-channels // 32)
        options = passes.carry_rows(n_chunks)
        rows.add(2 ** options['LOG_ROWS'])
        scan_carry_kernel[(2 * state * blocks,)](
            states, sums, A, given, channels, n_chunks, blocks, N=state, BLOCK=32, UNROLL=8,
            HAS_FIRST=first, BACKWARD=backward, OVERLAP=False, **options,
        )
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert rows == {1, 8, 32}


@pytest.mark.plain_empty  # poison would touch every page
@pytest.mark.parametrize('chunk', [0, 4])
def test_tokens_that_32_bits_do_not_reach(monkeypatch, chunk):
    """The last token of u and of the gate lies more than 2^31 numbers behind the first."""
    case = SMALL | {'batch': 1, 'length': 9}
    expected, made = gradients(case, chunk), make_inputs
    is_wide, found = passes.is_wide, []

    def apart(case):
        inputs = made(case)
        for name in ('u', 'z'):
            x = inputs[name]
            # Memory of which hardly a page is touched.
            memory = torch.empty(8 * (1 << 28) + 4, dtype=x.dtype)
            inputs[name] = memory.as_strided(x.shape, (0, 1, 1 << 28)).copy_(x)
        return inputs

    monkeypatch.setitem(globals(), 'make_inputs', apart)
    monkeypatch.setattr(passes, '_COPY_ABOVE', 1 << 62)
    monkeypatch.setattr(passes, 'is_wide', lambda *rest: found.append(is_wide(*rest)) or found[-1])
    triton_backend.forget()
    for name, x in gradients(case, chunk).items():
        assert torch.equal(x, expected[name]), name
    assert any(found)


def test_every_run_gives_the_same_bits():
    case = SMALL | {'batch': 1}
    first, second = gradients(case, chunk=8), gradients(case, chunk=8)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_many_states_are_scanned_in_parts():
    state = triton_backend.MAX_STATE + 3
    check_case(SMALL | {'state': state, 'length': 5, 'chunk': 0, 'last': True})


def test_positive_rates_and_large_steps():
    inputs = make_inputs(SMALL)
    inputs['delta'] *= 30  # softplus is the identity, exp(delta A) underflows to zero
    inputs['z'] *= 60
    y, last = selective_scan(*inputs.values(), True, True, backend='triton')
    exact = [x.double() for x in inputs.values()]
    exact[3:5] = [x.squeeze(1) for x in exact[3:5]]
    y_exact, last_exact = selective_scan(*exact, True, True, backend='reference')
    assert_close('y', y, y_exact, 1e-6)
    assert_close('last state', last, last_exact, 1e-6)


@pytest.mark.parametrize('empty', ['batch', 'group_dim', 'length'])
def test_empty_tensors(empty):
    case = SMALL | {'gate': False, empty: 0}
    inputs = make_inputs(case)
    inputs = {name: x if x is None else x.requires_grad_() for name, x in inputs.items()}
    y, last = run_triton(inputs, None, case, 0)
    assert y.shape == inputs['u'].shape and torch.equal(last, torch.zeros_like(last))
    (y.sum() + last.sum()).backward()
    for name, x in inputs.items():
        assert x is None or torch.equal(x.grad, torch.zeros_like(x)), name


def test_shared_tensor_and_strided_cotangent():
    """Groups that share u through a stride of zero, and the gradient of a plain sum."""
    case = SMALL | {'groups': 2, 'gate': False}
    inputs = make_inputs(case)
    shared = torch.randn(2, 1, 4, 13, generator=generator(3))
    results = []
    for dtype in (torch.float64, torch.float32):
        u = shared.to(dtype).requires_grad_()
        rest = [None if x is None else x.to(dtype) for x in list(inputs.values())[1:]]
        if dtype == torch.float64:
            y, _ = selective_scan_reference(u.expand(-1, 2, -1, -1).flatten(1, 2), *rest, True)
        else:
            rest[0] = rest[0].unflatten(1, (2, 4))
            y, _ = triton_backend.scan_grouped(u.expand(-1, 2, -1, -1), *rest, None, True, False)
        results.append((y.detach().reshape(2, 8, 13), *torch.autograd.grad(y.sum(), u)))
    assert_close('y', results[1][0], results[0][0], 1e-6)
    assert_close('gradient of u', results[1][1], results[0][1], 1e-6)


def test_results_are_token_major_and_large_inputs_become_so(monkeypatch):
    case = SMALL | {'layout': 'channel', 'length': 6}
    direct = gradients(case)
    triton_backend.forget()
    monkeypatch.setattr(passes, '_COPY_ABOVE', 0)
    copied = gradients(case)
    triton_backend.forget()
    for name, x in direct.items():
        assert torch.equal(copied[name], x), name
        assert name not in ('y', 'u', 'delta', 'z') or copied[name].stride(1) == 1, name
    shared = torch.zeros(2, 1, 3, 5).expand(-1, 4, -1, -1)
    assert passes.lanes(shared).stride() == (15, 0, 1, 3)


def test_output_lands_in_a_view():
    """The left half of a token-major buffer, as a mixer concatenates its two branches."""
    inputs = make_inputs(SMALL)
    for name in ('u', 'delta', 'z'):
        inputs[name] = inputs[name].unflatten(1, (1, 4))
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.full((2, 13, 8), 7.0, dtype=dtype)
        view = buffer[..., :4].transpose(1, 2).unflatten(1, (1, 4))
        laid = (*inputs.values(), None)
        _, last, _ = passes.forward(laid, True, False, gradients=False, out=view)
        y, last_y = triton_backend.scan_grouped(*laid, True, False)
        assert_close('view', view, y, STORED[dtype])
        assert torch.equal(last, last_y)
        assert torch.equal(buffer[..., 4:], torch.full((2, 13, 4), 7.0, dtype=dtype))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('chunk', [4, 16])
def test_words_of_four_states_give_the_bits_of_single_ones(dtype, chunk):
    """B and C as MambaVision-T has them in stage 3: at bytes 40 and 56 of rows of 72."""
    case = SMALL | {'length': 9, 'state': 8, 'dtype': dtype, 'layout': 'token'}
    inputs = make_inputs(case)
    for name in ('u', 'delta', 'z'):
        inputs[name] = inputs[name].unflatten(1, (1, 4))
    rows = torch.randn(2, 9, 36, generator=generator(5)).to(dtype)
    results = []
    for shift in (0, 1):
        memory = torch.zeros(2 * 9 * 36 + 4, dtype=dtype)
        memory = memory[shift:][: rows.numel()].view(rows.shape).copy_(rows)
        B, C = (memory[..., i : i + 8].mT.unsqueeze(1) for i in (20, 28))
        assert passes.packs(B, C) == (shift == 0)
        laid = (*(inputs | {'B': B, 'C': C}).values(), None)
        results.append(passes.forward(laid, True, False, False, chunk))
    for packed, single in zip(*results, strict=True):
        assert torch.equal(packed, single)


def test_what_makes_words_of_four_states():
    rows = torch.zeros(3, 5, 72, dtype=torch.bfloat16)
    B = rows[..., 20:28].mT
    assert passes.packs(B, B) and passes.packs(B[:, None], B[:, None].expand(-1, 4, -1, -1))
    assert passes.packs(B[:1], B[..., :1])
    odd = torch.zeros(3, 5, 38, dtype=torch.bfloat16)[..., :8].mT
    assert passes.packs(odd[:1, :, :1], B)  # nobody steps along an axis of one element
    for other in (odd, B[:, :3], B[:, ::2], B[:, 1:5], B.float(), B.contiguous(),
                  rows.view(-1)[2:74].view(1, 1, 72)[..., :8].mT):
        assert not passes.packs(B, other) and not passes.packs(other, B)


def test_public_function_with_an_order():
    case = SMALL | {'groups': 2, 'order': 'with holes', 'length': 6}
    inputs, results = make_inputs(case), []
    for name in ('u', 'delta', 'z'):
        inputs[name] = inputs[name].unflatten(1, (2, 4))
    for backend in ('triton', 'reference'):
        leaves = {k: x.detach().requires_grad_() for k, x in inputs.items()}
        y, last = selective_scan_ordered(
            **leaves, delta_softplus=True, return_last_state=True, order=make_order(case)[0],
            reverse=True, backend=backend,
        )
        grads = torch.autograd.grad(y.square().sum() + last.sum(), list(leaves.values()))
        named = dict(zip(leaves, grads, strict=True))
        results.append({'y': y.detach(), 'last state': last.detach()} | named)
    for name, x in results[0].items():
        assert_close(name, x, results[1][name], 2e-6)


# The contract with PyTorch.


def operator_arguments(chunk):
    inputs = make_inputs(SMALL | {'length': 5, 'state': 2})
    shaped = [
        x.unflatten(1, (1, -1)) if name in ('u', 'delta', 'z') else x for name, x in inputs.items()
    ]
    order = torch.randperm(5, generator=generator(4)).int()[None]
    return [x.requires_grad_() for x in shaped], (order, True, False, True, chunk)


@pytest.mark.parametrize('chunk', [0, 4])
def test_opcheck(chunk):
    tensors, rest = operator_arguments(chunk)
    forward = torch.ops.mmhybrid.selective_scan_triton
    quick = ('test_schema', 'test_faketensor')
    more = ('test_autograd_registration', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(
        forward.default, (*tensors, *rest), test_utils=quick + more if chunk else quick)
    tensors = [x.detach() for x in tensors]
    y, last, states = forward(*tensors, *rest)
    backward = torch.ops.mmhybrid.selective_scan_triton_backward.default
    order, *flags = rest
    torch.library.opcheck(backward, (y, last, *tensors, order, states, *flags), test_utils=quick)


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(4, 4 + 2 * 3)
        self.A = torch.nn.Parameter(-torch.rand(4, 3))

    def forward(self, x):
        delta, B, C = self.project(x).transpose(1, 2).split([4, 3, 3], dim=1)
        y = selective_scan(
            x.transpose(1, 2), delta, self.A, B, C, delta_softplus=True, backend='triton'
        )
        return y.transpose(1, 2)


def test_compiled_module():
    torch.manual_seed(0)
    module, x = Mixer(), torch.randn(2, 6, 4)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    results = []
    for run in (module, compiled):
        module.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        u = torch.zeros(2, 5, 4096, requires_grad=True)
        B = torch.zeros(2, 8, 4096)
        y = selective_scan(u, torch.zeros(2, 5, 4096), torch.zeros(5, 8), B, B, backend='triton')
        y.sum().backward()
        assert y.shape == u.grad.shape == (2, 5, 4096)


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in make_inputs(SMALL | {'length': 2}).values()]
    y = selective_scan(*inputs, backend='triton')
    (du,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='first derivative only'):
        du.sum().backward()


def test_float64_is_refused():
    inputs = [x.double() for x in make_inputs(SMALL).values()]
    with pytest.raises(RuntimeError, match='float32'):
        selective_scan(*inputs, backend='triton')
