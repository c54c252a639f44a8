"""The scan through an order table, against reordering by hand."""

import pytest
import torch

from mmhybrid.ops import selective_scan
from mmhybrid.ops.cross_scan import scan_plan
from mmhybrid.ops.reorder import inverse_of, reorder
from mmhybrid.ops.selective_scan.ordered import selective_scan_ordered

BATCH, GROUP_DIM, STATE = 2, 3, 4


def make_inputs(groups, tokens):
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    channels = groups * GROUP_DIM
    return {
        'u': randn(BATCH, groups, GROUP_DIM, tokens),
        'delta': randn(BATCH, groups, GROUP_DIM, tokens),
        'A': (-torch.rand(channels, STATE, dtype=torch.float64)).requires_grad_(),
        'B': randn(BATCH, groups, STATE, tokens),
        'C': randn(BATCH, groups, STATE, tokens),
        'D': randn(channels),
        'z': randn(BATCH, groups, GROUP_DIM, tokens),
        'delta_bias': randn(channels),
    }


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('direction', ['h', 'v', 'w2'])
def test_directions_of_a_map(direction, reverse):
    """Tables of the cross scan, with windows that overhang a 3 x 5 map."""
    order = scan_plan([direction], 3, 5).orders[0]
    inputs = make_inputs(1, 15)
    y, last = selective_scan_ordered(
        **inputs, delta_softplus=True, return_last_state=True, order=order.order,
        reverse=reverse, backend='reference',
    )
    copies = {
        name: order.take(x.flatten(1, 2) if name in ('u', 'delta', 'z') else x)
        if x.shape[-1] == 15 else x
        for name, x in inputs.items()
    }
    y_copies, last_copies = selective_scan(
        **copies, delta_softplus=True, return_last_state=True, reverse=reverse,
        backend='reference',
    )
    expected = order.restore(y_copies)
    assert torch.equal(y.flatten(1, 2), expected) and torch.equal(last, last_copies)
    wanted = list(inputs.values())
    got = torch.autograd.grad(y.square().sum() + last.sum(), wanted)
    grads = torch.autograd.grad(expected.square().sum() + last_copies.sum(), wanted)
    for name, a, b in zip(inputs, got, grads, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f'gradient of {name}: {text}')


def test_one_table_per_group_and_a_shared_map():
    """Two directions read one map, as VMamba does, and each has its own parameters."""
    inputs = make_inputs(2, 6)
    inputs['u'] = inputs['u'][:, :1].detach().expand(-1, 2, -1, -1)
    order = torch.stack([torch.arange(6), torch.randperm(6)])
    y = selective_scan_ordered(**inputs, order=order)
    for g in range(2):
        d = slice(g * GROUP_DIM, (g + 1) * GROUP_DIM)
        alone = {name: x[d] if x.dim() < 3 else x[:, g : g + 1] for name, x in inputs.items()}
        torch.testing.assert_close(y[:, g : g + 1], selective_scan_ordered(**alone, order=order[g]))


def test_the_table_decides_what_the_state_has_seen():
    """A change reaches the tokens that are visited later, and no others."""
    inputs = {name: x.detach() for name, x in make_inputs(1, 4).items()}
    order = torch.tensor([2, 0, 3, 1])
    y = selective_scan_ordered(**inputs, order=order)
    inputs['u'] = inputs['u'].clone()
    inputs['u'][..., 3] += 1
    changed = (selective_scan_ordered(**inputs, order=order) - y).abs().amax((0, 1, 2)) > 0
    assert changed.tolist() == [False, True, False, True]


@pytest.mark.plain_empty
@pytest.mark.parametrize('rows', [1, 2])
def test_orders_of_several_groups_are_an_operator(rows):
    """The gather that all copies take, with a table per group and holes in it."""
    order = torch.tensor([[2, 0, -1, 3, 1, -1], [0, -1, -1, 1, 2, 3]])[:rows]
    inverse = inverse_of(order, 4)
    assert inverse.tolist() == [[1, 4, 0, 3], [0, 3, 4, 5]][:rows]
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = reorder(x, order, inverse, True, False)
    for g in range(2):
        row = order[min(g, rows - 1)]
        assert torch.equal(y[:, g], x[:, g, :, row.clamp_min(0)] * (row >= 0))
    assert torch.equal(reorder(y, inverse, order, False, True), x)
    assert torch.autograd.gradcheck(lambda x: reorder(x, order, inverse, True, False), x)
    found = torch.library.opcheck(
        torch.ops.mmhybrid.reorder.default, (x, order, inverse, True, False))
    assert set(found.values()) == {'SUCCESS'}


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'order': torch.zeros(4)}, TypeError, 'int32 or int64, got torch.float32'),
        ({'order': torch.zeros(3, dtype=torch.int32)}, ValueError, r"L' >= L = 4, got \(3,\)"),
        ({'order': torch.zeros(5, 4, dtype=torch.int32)}, ValueError, r'got \(5, 4\)'),
        ({'u': torch.zeros(2, 3, 4)}, ValueError, r'unflatten'),
        ({'z': torch.zeros(2, 1, 3, 5)}, ValueError, 'expects z like u'),
        ({'B': torch.zeros(2, 4, 4)}, ValueError, r'B of shape \(B, G, N, L\)'),
        ({'B': torch.zeros(2, 1, 4, 3)}, ValueError, r'expects B of shape \(2, 1, 4, 4\)'),
        ({'C': torch.zeros(2, 4, 4)}, ValueError, r'expects C of shape .*got \(2, 4, 4\)'),
        ({'A': torch.zeros(2, 4)}, ValueError, r'expects A of shape \(3, .*got \(2, 4\)'),
        ({'D': torch.zeros(2)}, ValueError, r'expects D of shape \(3,\)'),
        ({'delta_bias': torch.zeros(4)}, ValueError, r'expects delta_bias of shape \(3,\)'),
        ({'A': torch.zeros(3, 4, device='meta')}, ValueError, 'expects A on cpu like u, got meta'),
        ({'u': torch.zeros(2, 1, 3, 4).long()}, TypeError, 'u of a real floating dtype, got .*64'),
        ({'D': torch.zeros(3, dtype=torch.complex64)}, TypeError, 'D of a real floating dtype'),
        ({'A': torch.zeros(3, 0), 'B': torch.zeros(2, 1, 0, 4), 'C': torch.zeros(2, 1, 0, 4)},
         ValueError, r'with N >= 1, got \(2, 1, 0, 4\)'),
    ],
)
def test_errors_say_what_was_expected(change, error, message):
    inputs = make_inputs(1, 4) | {'order': torch.arange(4)} | change
    with pytest.raises(error, match=message):
        selective_scan_ordered(**inputs)
