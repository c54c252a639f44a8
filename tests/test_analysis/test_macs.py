"""Every rule on a layer that can be counted by hand."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmhybrid.analysis import CONVENTIONS, Record, Scan, count_macs, scan_macs, summarize
from mmhybrid.layers import SS2D, Attention, LocalVimMixer, MambaVisionMixer, VimMixer
from mmhybrid.ops import selective_scan


def on_meta(make):
    with torch.device('meta'):
        return make().eval()


def counted(module, *inputs):
    """{(module, kind): MACs}."""
    totals = {}
    for record in count_macs(module, lambda: module(*inputs)):
        key = record.module, record.kind
        totals[key] = totals.get(key, 0) + record.macs
    return totals


def empty(*shape):
    return torch.empty(*shape, device='meta')


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize(('make', 'shape', 'kind', 'macs'), [
    (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9, 7), 'conv',
     2 * 8 * 5 * 4 * 3 * 9),
    (lambda: nn.Conv1d(4, 4, 3, groups=4), (1, 4, 10), 'conv', 4 * 8 * 3),
    (lambda: nn.ConvTranspose2d(6, 5, 2, stride=2), (1, 6, 3, 4), 'conv', 6 * 5 * 4 * 12),
    (lambda: nn.Linear(6, 5), (2, 7, 6), 'linear', 14 * 30),
    (lambda: nn.Linear(6, 5, bias=False), (7, 6), 'linear', 7 * 30),
    (lambda: nn.LayerNorm(6), (2, 7, 6), 'norm', 5 * 84),
    (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 7, 6), 'norm', 4 * 84),
    (lambda: nn.RMSNorm(6), (2, 7, 6), 'norm', 4 * 84),
    (lambda: nn.BatchNorm2d(6), (2, 6, 3, 3), 'norm', 2 * 108),
    (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 3), 'norm', 5 * 108),
    (lambda: nn.Upsample(scale_factor=2, mode='bilinear'), (1, 3, 4, 4), 'resize', 4 * 3 * 64),
    (lambda: nn.AdaptiveAvgPool2d(2), (1, 3, 4, 4), 'resize', 48),
], ids=lambda value: str(value) if isinstance(value, str) else None)
def test_layers(make, shape, kind, macs):
    assert counted(on_meta(make), empty(*shape)) == {('', kind): macs}


def test_attention_products_are_told_from_linear_layers():
    found = counted(on_meta(lambda: Attention(16, 4)), empty(3, 10, 16))
    assert found == {('qkv', 'linear'): 3 * 10 * 16 * 48, ('proj', 'linear'): 3 * 10 * 16 * 16,
                     ('', 'attention'): 2 * 3 * 4 * 10 * 10 * 4}
    # written out, as in Swin, it is the same
    q = empty(3, 4, 10, 4)
    found = counted(Call(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), q, q, q)
    assert found == {('', 'attention'): 2 * 3 * 4 * 10 * 10 * 4}
    found = counted(on_meta(lambda: nn.MultiheadAttention(16, 4, batch_first=True)),
                    *[empty(3, 10, 16)] * 3)
    assert sum(found.values()) == 3 * 10 * 16 * 64 + 2 * 3 * 4 * 10 * 10 * 4


def test_a_weight_that_is_changed_first_is_a_weight():
    class Halved(nn.Linear):
        def forward(self, x):
            weight = torch.cat([self.weight, self.weight])[torch.tensor([0, 2], device='meta')]
            return x @ (0.5 * weight).mT
    model = on_meta(lambda: nn.Sequential(Halved(6, 5)))
    assert counted(model, empty(3, 7, 6)) == {('0', 'linear'): 3 * 7 * 6 * 2}


@pytest.mark.parametrize('gate', [False, True])
@pytest.mark.parametrize('skip', [False, True])
def test_scan(gate, skip):
    x = empty(2, 6, 10)
    rows = empty(2, 4, 10)
    call = Call(lambda: selective_scan(
        x, x, empty(6, 4), rows, rows, empty(6) if skip else None, x if gate else None))
    record, = count_macs(call, call)
    assert record.scan == Scan(2 * 6 * 10, 4, skip, gate)
    assert record.macs == 9 * 2 * 6 * 10 * 4 + (gate + skip) * 2 * 6 * 10


def test_mambavision_mixer():
    L, C, R, N = 12, 32, 2, 8
    E = C // 2
    assert counted(on_meta(lambda: MambaVisionMixer(C)), empty(1, L, C)) == {
        ('in_proj', 'linear'): L * C * C, ('out_proj', 'linear'): L * C * C,
        ('x_proj', 'linear'): L * E * (R + 2 * N), ('dt_proj', 'linear'): L * R * E,
        ('', 'conv'): 2 * E * L * 3, ('', 'scan'): L * E * (9 * N + 1)}


def test_four_directions_of_a_map():
    H, W, C, R, N = 4, 6, 32, 2, 1
    L, D, K = H * W, 2 * C, 4
    assert counted(on_meta(lambda: SS2D(C)), empty(1, H, W, C)) == {
        ('in_proj', 'linear'): L * C * D, ('out_proj', 'linear'): L * C * D,
        ('conv2d', 'conv'): L * D * 9, ('out_norm', 'norm'): 5 * L * D,
        ('', 'linear'): K * L * D * (R + 2 * N) + K * L * R * D,
        ('', 'scan'): K * L * D * (9 * N + 1)}


@pytest.mark.parametrize(('make', 'directions'), [
    (lambda: VimMixer(16), 2), (lambda: LocalVimMixer(16, ('h', 'h_flip', 'v', 'v_flip')), 4)])
def test_one_direction_convention(make, directions):
    """The published count of LocalVim: projections of one direction, a cheaper scan, no norms."""
    model = on_meta(lambda: nn.Sequential(make()))
    x = empty(1, 36, 16)
    records = count_macs(model, lambda: model[0](x, (6, 6)))
    L, C, R, N = 36, 16, 1, 16
    E = 2 * C
    one = (L + 3) * E * 4 + L * E * (R + 2 * N) + L * R * E
    attention = directions * 2 * E * (E // 8) if directions == 4 else 0
    shared = L * C * 2 * E + L * E * C + attention
    total = summarize(model, records, 'localvim-released', 0)[0].total
    assert total == shared + one + directions * L * E * (5 * N + 2)
    everything = summarize(model, records, 'all', 0)[0]
    assert everything.total - everything.macs['norm'] == (
        shared + directions * (one + L * E * (9 * N + 1)))


def test_an_operator_of_ours_without_a_rule_is_refused():
    lib = torch.library.Library('mmhybrid', 'FRAGMENT')
    lib.define('not_counted(Tensor x) -> Tensor')
    lib.impl('not_counted', lambda x: x + 1, 'Meta')
    call = Call(lambda x: torch.ops.mmhybrid.not_counted(x))
    with pytest.raises(NotImplementedError, match='mmhybrid::not_counted has no rule'):
        count_macs(call, lambda: call(empty(2)))


def test_costs_add_up_over_modules():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

        def forward(self, x):
            # the way mmseg calls its heads, which hooks do not see
            return F.relu(self.inner.forward(self.first(x)))

    model = on_meta(Two)
    records = count_macs(model, lambda: model(empty(10, 4)))
    rows = {row.module: row for row in summarize(model, records, 'all', None)}
    assert list(rows) == ['total', 'first', 'inner', 'inner.0', 'inner.1']
    assert rows['total'].total == 2 * 160 + 200
    assert rows['inner'].macs == dict(conv=0, linear=160, attention=0, scan=0, norm=200, resize=0)
    assert rows['inner'].parameters == 28 and rows['total'].parameters == 48
    shallow = summarize(model, records, 'conv-linear', 1)
    assert [row.module for row in shallow] == ['total', 'first', 'inner']
    assert shallow[0].total == 320 and shallow[0].macs['norm'] == 200
    assert 'forward' not in vars(model)  # nothing is left behind


def test_conventions_name_known_kinds():
    for name, rule in CONVENTIONS.items():
        assert rule.text and rule.rois in ('test_cfg', 'mmdet2', 'mmdet3'), name
    record = Record('a.x_proj_1', 'linear', 7)
    assert CONVENTIONS['all'].macs(record) == 7
    assert CONVENTIONS['localvim-released'].macs(record) == 0
    assert scan_macs(Scan(10, 2, True, True)) == 200
