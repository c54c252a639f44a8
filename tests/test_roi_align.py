"""RoIAlign as sums of rows against torchvision; against mmcv it is in test_mmcv_ops.py."""

import pytest
import torch

torchvision = pytest.importorskip('torchvision')

from mmhybrid import mmcv_ops, roi_align  # noqa: E402


def rois_of(kind, count=40, maps=3, extent=100.0):
    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * extent * 0.7
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * extent * 0.4
    if kind == 'long':
        size[::2, 0] *= 5
        size[1::2, 1] *= 5
    elif kind == 'tiny':
        size *= 0.02
    elif kind == 'outside':
        corner = corner * 3 - extent
    elif kind == 'backwards':
        size[::3] *= -1
    elif kind == 'huge and tiny':
        size[::2] *= 10
        size[1::2] *= 0.01
    index = torch.arange(count)[:, None] % maps  # the images take turns: no order in the RoIs
    return torch.cat([index, corner, corner + size], dim=1)


def both(maps, rois, size, scale, samples, aligned):
    """Results and gradients: ours and torchvision's."""
    ours = roi_align.roi_align(maps, rois, size, scale, samples, aligned)
    theirs = torch.ops.torchvision.roi_align(maps, rois, scale, *size, samples, aligned)
    grad = torch.linspace(-1, 1, theirs.numel(), dtype=maps.dtype).view_as(theirs)
    return ((ours, theirs),
            (roi_align.roi_align_gradient(grad, rois, maps.shape, scale, samples, aligned),
             torch.ops.torchvision._roi_align_backward(
                 grad, rois, scale, *size, *maps.shape, samples, aligned)))


def check(*arguments, **tolerance):
    for part, (ours, theirs) in zip(('result', 'gradient'), both(*arguments), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, msg=lambda m, p=part: f'{p}: {m}', **tolerance)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('samples', [0, 1, 2, 5])
@pytest.mark.parametrize(
    'kind', ['usual', 'long', 'tiny', 'outside', 'backwards', 'huge and tiny'])
def test_equals_torchvision(kind, samples, aligned):
    maps = torch.randn(3, 5, 23, 31, dtype=torch.float64)
    check(maps, rois_of(kind), (7, 4), 0.25, samples, aligned, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 3, 1, 9), (2, 3, 9, 1), (1, 17, 2, 2)])
@pytest.mark.parametrize('size', [(1, 1), (7, 7), (1, 14)])
def test_odd_sizes(shape, size):
    maps = torch.randn(shape, dtype=torch.float64)
    rois = rois_of('usual', 12, maps=shape[0], extent=10.0)
    rois[0, 1:] = torch.tensor([0, 0, 1e-3, 1e-3])
    check(maps, rois, size, 0.5, 0, True, rtol=1e-10, atol=1e-12)


def test_single_precision():
    maps, rois = torch.randn(3, 48, 40, 40), rois_of('usual', extent=160.0).float()
    check(maps, rois, (7, 7), 0.25, 2, True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('samples', [0, 2])
def test_long_lists_are_done_in_parts(monkeypatch, samples):
    maps, rois = torch.randn(3, 5, 23, 31, dtype=torch.float64), rois_of('long')
    whole = both(maps, rois, (7, 4), 0.25, samples, True)
    monkeypatch.setattr(roi_align, '_MOST_TAPS', 1000)
    tables = roi_align._tables(rois, maps.shape, (7, 4), 0.25, samples, True)
    assert len(list(tables)) > 5
    parts = both(maps, rois, (7, 4), 0.25, samples, True)
    for (first, _), (second, _) in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)


def test_no_rois():
    maps, rois = torch.randn(2, 3, 5, 6), torch.zeros(0, 5)
    assert roi_align.roi_align(maps, rois, (7, 4), 0.25, 0, True).shape == (0, 3, 7, 4)
    gradient = roi_align.roi_align_gradient(
        torch.zeros(0, 3, 7, 4), rois, maps.shape, 0.25, 0, True)
    assert torch.equal(gradient, torch.zeros_like(maps))


def test_layouts_give_the_same():
    maps, rois = torch.randn(3, 5, 23, 31), rois_of('usual').float()
    expected = roi_align.roi_align(maps, rois, (7, 4), 0.25, 2, True)
    for other in (maps.to(memory_format=torch.channels_last),
                  maps.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
                  torch.cat([maps, maps], 1)[:, 5:]):
        assert torch.equal(roi_align.roi_align(other, rois, (7, 4), 0.25, 2, True), expected)
    grad = torch.randn(expected.shape)
    gradients = [roi_align.roi_align_gradient(each, rois, maps.shape, 0.25, 2, True)
                 for each in (grad, grad.to(memory_format=torch.channels_last))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('samples', [0, 2])
def test_numbers_of_a_diverged_model_stay_in_their_roi(samples, value):
    maps, rois = torch.randn(3, 5, 23, 31), rois_of('usual').float()
    expected = roi_align.roi_align(maps, rois, (7, 4), 0.25, samples, True)
    rois[3, 3] = value
    got = roi_align.roi_align(maps, rois, (7, 4), 0.25, samples, True)
    others = torch.arange(len(rois)) != 3
    torch.testing.assert_close(got[others], expected[others])
    assert got.shape == expected.shape


@pytest.mark.skipif(mmcv_ops.implementation() == 'compiled', reason='mmcv is compiled')
@pytest.mark.parametrize('count, ours', [(40, True), (1, False)])
def test_the_stand_in_takes_it_where_it_pays(monkeypatch, count, ours):
    roi_align_of_mmcv = pytest.importorskip('mmcv.ops').roi_align
    calls = []
    for name in ('roi_align', 'roi_align_gradient'):
        function = getattr(roi_align, name)
        monkeypatch.setattr(roi_align, name, lambda *args, name=name, function=function:
                            calls.append(name) or function(*args))
    maps, rois = torch.randn(3, 5, 23, 31, requires_grad=True), rois_of('usual').float()[:count]
    roi_align_of_mmcv(maps, rois, (7, 4), 0.25, 2, 'avg', True).sum().backward()
    assert calls == (['roi_align', 'roi_align_gradient'] if ours else [])


@pytest.mark.skipif(mmcv_ops.implementation() == 'compiled', reason='mmcv is compiled')
def test_tensors_without_values_go_to_torchvision():
    roi_align_of_mmcv = pytest.importorskip('mmcv.ops').roi_align
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        maps, rois = torch.randn(3, 5, 23, 31, requires_grad=True), torch.zeros(40, 5)
        got = roi_align_of_mmcv(maps, rois, (7, 4), 0.25, 0, 'avg', True)
        got.sum().backward()
    assert got.shape == (40, 5, 7, 4) and maps.grad.shape == maps.shape
