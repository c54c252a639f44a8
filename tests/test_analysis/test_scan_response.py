"""What tokens add to a scan's result: their sum is the result, for every mixer and direction."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmhybrid.analysis.models.directions import response
from mmhybrid.analysis.scan_response import Scan, contributions
from mmhybrid.errors import UserError
from mmhybrid.layers import SS2D, LocalSS2D, LocalVimMixer, VimMixer
from mmhybrid.ops.selective_scan import selective_scan

GRID, PLACE, AT = (5, 7), (0.6, 0.4), (2, 4)
TOKEN = AT[0] * GRID[1] + AT[1]
LOCAL = 'h', 'v_flip', 'w2', 'w7_flip'


def test_the_sum_is_the_scan():
    E, L, N = 3, 6, 2
    x, B, C = torch.randn(E, L), torch.randn(N, L), torch.randn(N, L)
    delta, A, D = torch.rand(E, L), -torch.rand(E, N), torch.randn(E)
    y = selective_scan(x[None], delta[None], A, B[None], C[None], D, backend='reference')[0]
    for at in range(L):
        added = contributions(Scan(x, delta, A, B, C, D), at)
        assert added.shape == (E, L) and added.dtype == torch.float64
        torch.testing.assert_close(added.sum(1), y[:, at].double(), atol=1e-5, rtol=1e-5)
        assert (added[:, at + 1:] == 0).all() and (added[:, :at + 1] != 0).all()


def merged_by(mixer, listener, x, *grid):
    """What a mixer puts into one of its layers."""
    seen = []
    handle = listener.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        mixer(x, *grid)
    handle.remove()
    return seen[0][0]


def assert_sum(found, expected):
    assert found.at == AT
    torch.testing.assert_close(found.values.sum(0), expected.double(), atol=1e-6, rtol=1e-4)
    assert found.added.shape == (len(found.directions), *GRID) and (found.added >= 0).all()


@pytest.mark.parametrize(('channel_first', 'gate'), [(True, False), (False, False), (False, True)])
def test_vmamba(channel_first, gate):
    mixer = SS2D(8, state_dim=2, channel_first=channel_first, gate=gate).eval()
    x = torch.randn(1, 8, *GRID) if channel_first else torch.randn(1, *GRID, 8)
    y = merged_by(mixer, mixer.out_norm, x)
    y = y.permute(1, 2, 0) if channel_first else y
    found = response(mixer, x, GRID, None, PLACE)
    assert_sum(found, y[AT])
    rows, columns = torch.arange(5)[:, None], torch.arange(7)
    before = dict(h=(rows < 2) | (rows == 2) & (columns <= 4),
                  v=(columns < 4) | (columns == 4) & (rows <= 2),
                  h_flip=(rows > 2) | (rows == 2) & (columns >= 4),
                  v_flip=(columns > 4) | (columns == 4) & (rows >= 2))
    for name, added in zip(found.directions, found.added, strict=True):
        assert torch.equal(added > 0, before[name]), name


@pytest.mark.parametrize(('directions', 'attention', 'restore'), [
    (LOCAL, 'channel', 'exact'), (('h', 'v', 'v_flip', 'w2_flip'), 'channel', 'released'),
    (('h', 'w3'), 'channel-spatial', 'exact'), (('v', 'h_flip'), 'none', 'exact')])
def test_localvmamba(directions, attention, restore):
    mixer = LocalSS2D(8, directions, attention, v_restore=restore).eval()
    x = torch.randn(1, *GRID, 8)
    found = response(mixer, x, GRID, None, PLACE)
    assert_sum(found, merged_by(mixer, mixer.out_norm, x)[AT])
    assert found.directions == directions


@pytest.mark.parametrize('class_token', [None, 0, 17])
def test_vim(class_token):
    mixer = VimMixer(8, 4, divide=False).eval()
    x = torch.randn(1, 35 + (class_token is not None), 8)
    token = TOKEN + (class_token is not None and TOKEN >= class_token)
    gated = merged_by(mixer, mixer.in_proj, x)  # the input, so that the gate can be told
    gate = F.silu(mixer.in_proj(gated).chunk(2, dim=-1)[1])[token]
    mixer.out_proj.weight = nn.Parameter(torch.eye(16)[:8])
    with torch.no_grad():
        y = mixer(x, GRID)[0, token] / gate[:8]
    found = response(mixer, x, GRID, class_token, PLACE)
    found.values = found.values[:, :8]
    assert_sum(found, y)
    assert (found.rest > 0).any() == (class_token is not None)


@pytest.mark.parametrize(('directions', 'class_token', 'attention', 'restore'), [
    (('h', 'h_flip', 'w2', 'v'), False, 'channel', 'exact'),
    (('h', 'h_flip', 'w2', 'v_flip'), True, 'channel', 'exact'),
    (('h', 'v'), False, 'channel', 'released'), (('h', 'v'), False, 'none', 'exact')])
def test_localvim(directions, class_token, attention, restore):
    mixer = LocalVimMixer(8, directions, class_token=class_token, attention=attention, state_dim=4,
                          v_restore=restore).eval()
    x = torch.randn(1, 35 + class_token, 8)
    token = TOKEN + (class_token and TOKEN >= 17)
    found = response(mixer, x, GRID, 17 if class_token else None, PLACE)
    assert_sum(found, merged_by(mixer, mixer.out_proj, x, GRID)[token])


def test_one_token_and_the_edges():
    mixer = SS2D(8, directions=('h', 'w7')).eval()
    for place in ((0., 0.), (0.999, 0.999)):
        found = response(mixer, torch.randn(1, 1, 1, 8), (1, 1), None, place)
        assert found.at == (0, 0) and found.added.shape == (2, 1, 1)
    assert response(mixer, torch.randn(1, 5, 7, 8), GRID, None, (1., 1.)).at == (4, 6)


@pytest.mark.parametrize('mixer', [LocalSS2D(8, None), LocalVimMixer(8, None)])
def test_a_search_is_refused(mixer):
    x = torch.randn(1, 5, 7, 8) if isinstance(mixer, LocalSS2D) else torch.randn(1, 35, 8)
    with pytest.raises(UserError, match='directions of this network are being searched'):
        response(mixer, x, GRID, None, PLACE)
