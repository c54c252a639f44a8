"""The torchvision stand-in for mmcv._ext: values, gradients, import behaviour."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('mmcv')
pytest.importorskip('torchvision')

import mmhybrid.plugin  # noqa: F401  installs the finder
from mmhybrid import mmcv_ops

COMPILED = mmcv_ops.implementation() == 'compiled'
needs_compiled = pytest.mark.skipif(
    not COMPILED, reason='mmcv has no compiled operators here to compare with'
)
needs_fallback = pytest.mark.skipif(COMPILED, reason='compiled mmcv operators are installed')


# ---------------------------------------------------------------- oracles, by definition
def bilinear(image, y, x):
    """image (C, H, W) at one real position; outside by more than a pixel is zero."""
    _, height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(image.shape[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    wy, wx = y - y0, x - x0
    top = image[:, y0, x0] * (1 - wx) + image[:, y0, x1] * wx
    bottom = image[:, y1, x0] * (1 - wx) + image[:, y1, x1] * wx
    return top * (1 - wy) + bottom * wy


def slow_roi_align(features, rois, size, scale, sampling_ratio, aligned):
    pooled = []
    for roi in rois.tolist():
        image = features[int(roi[0])]
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0.0) for value in roi[1:])
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_h, bin_w = height / size[0], width / size[1]
        ny = sampling_ratio or math.ceil(bin_h)
        nx = sampling_ratio or math.ceil(bin_w)
        rows = []
        for i in range(size[0]):
            for j in range(size[1]):
                total = features.new_zeros(features.shape[1])
                for a in range(ny):
                    for b in range(nx):
                        y = y1 + (i + (a + 0.5) / ny) * bin_h
                        x = x1 + (j + (b + 0.5) / nx) * bin_w
                        total = total + bilinear(image, y, x)
                rows.append(total / max(ny * nx, 1))
        pooled.append(torch.stack(rows, dim=1).reshape(-1, *size))
    return torch.stack(pooled)


def slow_nms(boxes, scores, threshold, offset):
    boxes = boxes.double().tolist()
    kept = []
    for i in scores.argsort(descending=True).tolist():
        a = boxes[i]
        for j in kept:
            b = boxes[j]
            w = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
            h = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
            area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
            area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
            if w * h / (area_a + area_b - w * h) > threshold:
                break
        else:
            kept.append(i)
    return kept


def random_boxes(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size * 0.7
    extent = torch.rand(count, 2, generator=generator) * size * 0.4 + 0.5
    scores = torch.randperm(count, generator=generator).float() / count  # no ties
    return torch.cat([corner, corner + extent], dim=1), scores


def random_rois():
    boxes, _ = random_boxes(5, 40, seed=3)
    index = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]])
    tiny_and_outside = torch.tensor([[0, 10.0, 12.0, 10.2, 12.1], [1, -30.0, -8.0, 60.0, 50.0]])
    return torch.cat([torch.cat([index, boxes], dim=1), tiny_and_outside])


# ---------------------------------------------------------------- values and gradients
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.4, 0.6])
def test_nms_keeps_what_the_definition_keeps(offset, threshold):
    boxes, scores = random_boxes(200, 25)
    expected = slow_nms(boxes, scores, threshold, offset)
    got = mmcv_ops.nms(boxes, scores, iou_threshold=threshold, offset=offset)
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    assert 0 < len(expected) < 200  # something was dropped, something was kept


def test_nms_offset_changes_the_result():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1.0, 0, 3, 2]])  # IoU 1/3, with offset 1/2
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_ops.nms(boxes, scores, 0.4, 0).tolist() == [0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.4, 1).tolist() == [0]


def test_nms_of_nothing_is_nothing():
    got = mmcv_ops.nms(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.5, offset=0)
    assert got.shape == (0,) and got.dtype == torch.int64


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_nms_takes_half_precision(dtype):
    boxes, scores = random_boxes(30, 40)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    got = mmcv_ops.nms(boxes, scores, iou_threshold=0.5, offset=0)
    again = mmcv_ops.nms(boxes.float(), scores.float(), iou_threshold=0.5, offset=0)
    assert torch.equal(got, again)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('size', [(1, 1), (3, 2)])
def test_roi_align_and_its_gradient_follow_the_definition(aligned, sampling_ratio, size):
    from mmcv.ops import roi_align

    features = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    rois = random_rois().double()
    ours = features.clone().requires_grad_()
    slow = features.clone().requires_grad_()
    got = roi_align(ours, rois, size, 0.25, sampling_ratio, 'avg', aligned)
    expected = slow_roi_align(slow, rois, size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)

    weight = torch.randn_like(expected)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), ours)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), slow)
    torch.testing.assert_close(got_grad, expected_grad, rtol=1e-9, atol=1e-11)


def test_aligned_and_sampling_ratio_matter():
    from mmcv.ops import roi_align

    features, rois = torch.randn(2, 3, 11, 13), random_rois()
    base = roi_align(features, rois, (3, 2), 0.25, 2, 'avg', True)
    assert not torch.allclose(base, roi_align(features, rois, (3, 2), 0.25, 2, 'avg', False))
    assert not torch.allclose(base, roi_align(features, rois, (3, 2), 0.25, 0, 'avg', True))


def test_roi_align_of_no_rois():
    from mmcv.ops import roi_align

    features = torch.randn(2, 3, 11, 13, requires_grad=True)
    got = roi_align(features, torch.zeros(0, 5), (3, 2), 0.25, 0, 'avg', True)
    assert got.shape == (0, 3, 3, 2)
    got.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_roi_align_takes_strided_features_and_gradients():
    from mmcv.ops import roi_align

    features = torch.randn(2, 11, 13, 3).permute(0, 3, 1, 2).requires_grad_()
    contiguous = features.detach().contiguous().requires_grad_()
    weight = torch.randn(7, 2, 3, 3).permute(0, 3, 2, 1)
    for leaf in (features, contiguous):
        (roi_align(leaf, random_rois(), (3, 2), 0.25, 2, 'avg', True) * weight).sum().backward()
    torch.testing.assert_close(features.grad, contiguous.grad)


@needs_fallback
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    from mmcv.ops import roi_align

    features = torch.randn(2, 3, 11, 13).to(dtype).requires_grad_()
    rois = random_rois().to(dtype)
    got = roi_align(features, rois, (3, 2), 0.25, 2, 'avg', True)
    full = features.detach().float().requires_grad_()
    expected = roi_align(full, rois.float(), (3, 2), 0.25, 2, 'avg', True)
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))
    weight = torch.randn_like(expected).to(dtype)
    (got_grad,) = torch.autograd.grad((got * weight).sum(), features)
    (expected_grad,) = torch.autograd.grad((expected * weight.float()).sum(), full)
    assert torch.equal(got_grad, expected_grad.to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    boxes, scores = random_boxes(300, 60)
    on_cpu = mmcv_ops.nms(boxes, scores, iou_threshold=0.4, offset=0)
    on_gpu = mmcv_ops.nms(boxes.cuda(), scores.cuda(), iou_threshold=0.4, offset=0)
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)

    features, rois = torch.randn(2, 8, 21, 34).to(dtype), random_rois().to(dtype)
    arguments = dict(
        aligned_height=7, aligned_width=5, spatial_scale=0.25, sampling_ratio=0, pool_mode=1,
        aligned=True,
    )
    results = []
    for device in ('cpu', 'cuda'):
        values, regions = features.to(device), rois.to(device)
        output, empty = values.new_zeros(7, 8, 7, 5), values.new_zeros(0)
        mmcv_ops.roi_align_forward(values, regions, output, empty, empty, **arguments)
        grad_input = torch.zeros_like(values)
        mmcv_ops.roi_align_backward(output, regions, empty, empty, grad_input, **arguments)
        results.append((output.float().cpu(), grad_input.float().cpu()))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for part, gpu, cpu in zip(('output', 'gradient'), results[1], results[0], strict=True):
        torch.testing.assert_close(
            gpu, cpu, rtol=tolerance, atol=tolerance, msg=lambda m, p=part: f'{p}: {m}'
        )


def test_the_public_wrappers_of_mmcv_work():
    from mmcv.ops import RoIAlign, batched_nms, nms

    boxes, scores = random_boxes(50, 40)
    labels = torch.arange(50) % 3
    kept, order = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.3))
    expected = []
    for label in range(3):
        members = (labels == label).nonzero().flatten()
        chosen = slow_nms(boxes[members], scores[members], 0.3, 0)
        expected += members[chosen].tolist()
    assert order.tolist() == sorted(expected, key=lambda i: -float(scores[i]))
    assert torch.equal(kept, torch.cat([boxes[order], scores[order, None]], dim=1))

    _, agnostic = batched_nms(
        boxes, scores, labels, dict(type='nms', iou_threshold=0.3), class_agnostic=True
    )
    assert agnostic.tolist() == slow_nms(boxes, scores, 0.3, 0)

    array, order = nms(boxes.numpy(), scores.numpy(), 0.3, score_threshold=0.2, max_num=5)
    assert array.shape == (5, 5) and array[:, 4].min() > 0.2
    assert order.tolist() == slow_nms(boxes, scores, 0.3, 0)[:5]

    layer = RoIAlign((2, 2), spatial_scale=0.25, sampling_ratio=0)
    assert layer(torch.randn(2, 3, 11, 13), random_rois()).shape == (7, 3, 2, 2)


def test_mmdet_crops_masks_through_it():
    structures = pytest.importorskip('mmdet.structures.mask')
    import numpy as np

    mask = np.zeros((1, 20, 30), dtype=np.uint8)
    mask[:, 5:15, 10:20] = 1
    crop = structures.BitmapMasks(mask, 20, 30).crop_and_resize(
        np.array([[10.0, 5.0, 30.0, 15.0]], dtype=np.float32), (4, 4), inds=np.zeros(1, int)
    )
    assert crop.masks[0].tolist() == [[1, 1, 0, 0]] * 4


# ---------------------------------------------------------------- against the compiled operators
@needs_compiled
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('count', [0, 1, 500])
def test_nms_equals_compiled(offset, count):
    from mmcv import _ext

    boxes, scores = random_boxes(count, 80, seed=count)
    for threshold in (0.2, 0.5, 0.8):
        theirs = _ext.nms(boxes, scores, iou_threshold=threshold, offset=offset)
        ours = mmcv_ops.nms(boxes, scores, iou_threshold=threshold, offset=offset)
        assert torch.equal(ours, theirs)


@needs_compiled
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_equals_compiled(dtype, aligned, sampling_ratio):
    from mmcv import _ext

    features, rois = torch.randn(2, 8, 21, 34, dtype=dtype), random_rois().to(dtype)
    arguments = dict(
        aligned_height=7, aligned_width=5, spatial_scale=0.25, sampling_ratio=sampling_ratio,
        pool_mode=1, aligned=aligned,
    )
    empty = features.new_zeros(0)
    results = {}
    for name, module in (('theirs', _ext), ('ours', mmcv_ops)):
        output = features.new_zeros(rois.shape[0], 8, 7, 5)
        module.roi_align_forward(features, rois, output, empty, empty, **arguments)
        grad = torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape)
        grad_input = torch.zeros_like(features)
        module.roi_align_backward(grad, rois, empty, empty, grad_input, **arguments)
        results[name] = output, grad_input
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0, atol=1e-12)
    for part, theirs, ours in zip(('output', 'gradient'), *results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, p=part: f'{p}: {m}', **tolerance)


@needs_compiled
def test_compiled_module_is_left_alone():
    from mmcv import _ext

    assert _ext.__file__ and not isinstance(_ext.__loader__, mmcv_ops._FallbackLoader)
    assert not hasattr(_ext, 'IS_STAND_IN')


# ---------------------------------------------------------------- what is not there
@needs_fallback
def test_another_op_explains_itself_when_called():
    from mmcv import _ext

    with pytest.raises(mmcv_ops.CompiledOpMissing) as caught:
        _ext.softnms(1, 2, iou_threshold=0.5)
    message = str(caught.value)
    assert "'softnms'" in message
    assert mmcv_ops.compile_command() in message
    assert '--no-build-isolation' in message and '--no-binary' in message
    assert not hasattr(_ext, '__path__')  # only operator names resolve


@needs_fallback
def test_an_op_that_needs_compiling_raises_through_mmcv():
    from mmcv.ops import soft_nms

    with pytest.raises(mmcv_ops.CompiledOpMissing, match="'softnms'"):
        soft_nms(torch.rand(3, 4), torch.rand(3))


@needs_fallback
def test_max_pooling_is_refused_with_a_sentence():
    from mmcv.ops import roi_align

    with pytest.raises(mmcv_ops.CompiledOpMissing, match="pool_mode='avg'"):
        roi_align(torch.randn(2, 3, 11, 13), random_rois(), (2, 2), 0.25, 0, 'max', True)


@pytest.mark.parametrize(
    ('installed', 'expected', 'unexpected'),
    [
        (('onedl-mmcv', '2.3.6'), '--no-binary onedl-mmcv onedl-mmcv==2.3.6', 'uninstall'),
        (('mmcv-lite', '2.1.0'), '--no-binary mmcv mmcv==2.1.0', 'onedl'),
        (('mmcv', '2.1.0'), '--no-binary mmcv mmcv==2.1.0', 'uninstall'),
        (None, '--no-binary onedl-mmcv onedl-mmcv', 'uninstall'),
    ],
    ids=['fork', 'lite', 'upstream', 'none'],
)
def test_compile_command_names_the_installed_distribution(
    monkeypatch, installed, expected, unexpected
):
    monkeypatch.setattr(mmcv_ops, 'installed_mmcv', lambda: installed)
    command = mmcv_ops.compile_command()
    assert command.endswith(expected)
    assert unexpected not in command
    assert ('pip uninstall -y mmcv-lite' in command) == (installed == ('mmcv-lite', '2.1.0'))


# ---------------------------------------------------------------- import behaviour
def test_mmengine_sees_full_mmcv():
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert mmcv_full_available() is True


def test_install_is_idempotent():
    finders = [f for f in sys.meta_path if isinstance(f, mmcv_ops._FallbackFinder)]
    assert mmcv_ops.install() == mmcv_ops.implementation()
    again = [f for f in sys.meta_path if isinstance(f, mmcv_ops._FallbackFinder)]
    assert len(finders) == 1 and again == finders


def run_with_fake_mmcv(tmp_path, code, ext=None):
    """Run code where `mmcv` is an empty package, with mmengine out of sight (fast)."""
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    if ext is not None:
        (package / '_ext.py').write_text(ext)
    setup = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.modules['mmengine'] = None
        from mmhybrid import mmcv_ops
        mmcv_ops._log_once = lambda found: None
    """
    source = textwrap.dedent(setup) + textwrap.dedent(code)
    return subprocess.run([sys.executable, '-c', source], capture_output=True, text=True)


def test_a_module_found_by_the_normal_finders_wins(tmp_path):
    code = """
        assert mmcv_ops.install() == 'compiled'
        assert 'mmcv' not in sys.modules  # asking costs no import
        from mmcv import _ext
        assert _ext.nms() == 'compiled nms' and not hasattr(_ext, 'softnms')
        assert mmcv_ops.implementation() == 'compiled'
    """
    result = run_with_fake_mmcv(tmp_path, code, ext="def nms():\n    return 'compiled nms'\n")
    assert result.returncode == 0, result.stderr


def test_a_compiled_module_that_cannot_load_is_not_replaced(tmp_path):
    code = """
        assert mmcv_ops.install() == 'compiled'
        try:
            from mmcv import _ext
        except ImportError as error:
            assert 'undefined symbol' in str(error)
        else:
            raise AssertionError('the broken module was replaced silently')
    """
    result = run_with_fake_mmcv(tmp_path, code, ext="raise ImportError('undefined symbol: _Z')")
    assert result.returncode == 0, result.stderr


def test_stand_in_has_a_spec_and_needs_no_torchvision_to_be_imported(tmp_path):
    code = """
        sys.modules['torchvision'] = None
        assert mmcv_ops.install() == 'torchvision'
        import importlib.util
        spec = importlib.util.find_spec('mmcv._ext')
        assert spec is not None and spec.loader is not None
        from mmcv import _ext
        assert importlib.util.find_spec('mmcv._ext') is _ext.__spec__
        import torch
        try:
            _ext.nms(torch.zeros(1, 4), torch.zeros(1), iou_threshold=0.5, offset=0)
        except ImportError as error:
            assert "'nms' runs on torchvision" in str(error), error
            assert f'torch {torch.__version__}' in str(error), error
        else:
            raise AssertionError('nms ran without torchvision')
    """
    result = run_with_fake_mmcv(tmp_path, code)
    assert result.returncode == 0, result.stderr


def test_without_mmcv_nothing_is_provided():
    code = """
        import sys
        sys.modules['mmengine'] = None
        sys.modules['mmcv'] = None
        from mmhybrid import mmcv_ops
        assert mmcv_ops.install() == 'absent'
        try:
            import mmcv._ext
        except ImportError:
            pass
        else:
            raise AssertionError('mmcv._ext appeared without mmcv')
    """
    result = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_one_log_line_names_the_implementation():
    code = 'import mmhybrid; from mmhybrid import mmcv_ops; mmcv_ops.install(); mmcv_ops.install()'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [x for x in (result.stdout + result.stderr).splitlines() if 'mmcv operators' in x]
    assert len(lines) == 1
    assert ('compiled (' in lines[0]) == COMPILED
