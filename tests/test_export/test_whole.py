"""``mmhybrid export`` of whole models, and ``mmhybrid predict`` with what it wrote."""
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from PIL import Image
from shrink import shrink
from trained import trained

import mmhybrid
from mmhybrid.cli import main
from mmhybrid.prediction import onnx_file
from mmhybrid.prediction.onnx_file import OnnxPredictor

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings('ignore')
pytest.importorskip('mmdet'), pytest.importorskip('mmseg')
pytest.importorskip('onnx'), pytest.importorskip('onnxscript'), pytest.importorskip('onnxruntime')
CONFIGS = dict(det='cascade_mambavision_mini_coco', seg='upernet_mambavision_mini_ade20k',
               mask='mask_rcnn_vmamba_t_coco')
PIXELS = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
SIZES = dict(det=(96, 128), seg=(96, 128), mask=(96, 128))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """``files(kind)``: a checkpoint and its ONNX file."""
    folder = tmp_path_factory.mktemp('whole')

    def make(kind):
        weights, path = folder / f'{kind}.pth', folder / f'{kind}.onnx'
        if not path.exists():
            cfg = shrink(Config.fromfile(ROOT / 'configs' / f'{CONFIGS[kind]}.py'))
            torch.manual_seed(0)
            trained(cfg, weights, tuple(f'thing {n}' for n in range(150 if kind == 'seg' else 80)))
            assert main(['export', str(weights), '--to', 'onnx', '--out', str(path), '--size',
                         *map(str, SIZES[kind])]) == 0
        return weights, path
    return make


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs) > 0
    assert np.array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=2e-3)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
    for one, other in zip(ours.masks, theirs.masks, strict=True):
        assert (one != other).mean() < 1e-3


@pytest.mark.slow  # half a minute of processor time each
@pytest.mark.parametrize('kind', ['det', 'mask'])
def test_objects_are_those_of_pytorch(files, kind):
    weights, path = files(kind)
    model, there = OnnxPredictor(path), mmhybrid.load(weights, device='cpu')
    assert model.names == there.names and not model.finds_regions
    for image in (PIXELS, PIXELS.repeat(2, 0).repeat(2, 1)):  # once as large as the input, once not
        assert_alike(model.predict(image, score=0)[0], there.predict(image, score=0)[0])
    one, = model.predict(PIXELS, score=0, classes=[model.names[5]])
    assert set(one.labels) <= {5}


def test_regions_are_those_of_pytorch(files):
    weights, path = files('seg')
    model, there = OnnxPredictor(path), mmhybrid.load(weights, device='cpu')
    assert model.finds_regions and model.palette == there.palette
    ours, theirs = (each.predict(PIXELS)[0] for each in (model, there))
    assert (ours.map != theirs.map).mean() < 1e-3
    for large in model.predict(PIXELS.repeat(2, 0)), model.predict(PIXELS.repeat(2, 1), tile=100):
        assert large[0].size in ((192, 128), (96, 256)) and large[0].present


def test_the_command_needs_no_pytorch(files, tmp_path):
    _, path = files('seg')
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    code = f"""
        import importlib.abc, sys
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition('.')[0] in ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet',
                                              'mmseg', 'timm'):
                    raise ModuleNotFoundError(f'blocked: {{name}}', name=name)
        sys.meta_path.insert(0, Block())
        from mmhybrid.cli import main
        sys.exit(main(['predict', {str(tmp_path / 'a.png')!r}, '--weights', {str(path)!r},
                       '--out', {str(tmp_path / 'out')!r}, '--write', 'pictures', 'masks', 'yolo',
                       'labelme']))
    """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'Traceback' not in result.stderr
    mask = np.asarray(Image.open(tmp_path / 'out/masks/a.png'))
    assert np.array_equal(mask, OnnxPredictor(path).predict(PIXELS)[0].map)
    assert json.loads((tmp_path / 'out/predictions.json').read_text())['annotations']


def test_the_file_says_what_it_is(files):
    about = OnnxPredictor(files('seg')[1]).about
    assert about['task'] == 'segmentation' and about['size'] == [96, 128] and about['batch'] == 1
    assert about['opset'] == 18 and about['version'] == mmhybrid.__version__
    assert about['mean'] == pytest.approx([123.675, 116.28, 103.53]) and about['to_rgb'] is True
    assert len(about['classes']) == len(about['palette']) == 150


def test_wrong_use_is_told_in_a_sentence(files, tmp_path, capsys):
    weights, path = files('seg')
    (tmp_path / 'a.onnx').write_bytes(path.read_bytes()[:1000])
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    picture = str(tmp_path / 'a.png')

    def said(*arguments):
        assert main(list(arguments)) == 1
        error = capsys.readouterr().err
        assert 'Traceback' not in error
        return ' '.join(error.split())

    assert 'a.onnx cannot be read by onnxruntime' in said(
        'predict', picture, '--weights', str(tmp_path / 'a.onnx'))
    assert 'There is no file' in said('predict', picture, '--weights', str(tmp_path / 'b.onnx'))
    assert '--device cannot be used with' in said(
        'predict', picture, '--weights', str(path), '--device', 'cpu')
    assert 'score threshold is for detectors' in said(
        'predict', picture, '--weights', str(path), '--score', '0.5')
    assert 'is there already' in said('export', str(weights), '--out', str(path))
    assert 'has to end in .onnx' in said('export', str(weights), '--out', 'a.pt')
    assert 'heads of a whole model' in said(
        'export', str(weights), '--dynamic', '--out', str(tmp_path / 'c.onnx'))
    assert 'no neck' in said(
        'export', str(weights), '--part', 'neck', '--out', str(tmp_path / 'c.onnx'))
    assert '--size 8' in said(
        'export', str(weights), '--size', '8', '--out', str(tmp_path / 'c.onnx'))
    assert not (tmp_path / 'c.onnx').exists()


def test_without_a_package_the_way_to_install_it_is_told(files, tmp_path, capsys, monkeypatch):
    weights, path = files('seg')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert main(['export', str(weights), '--out', str(tmp_path / 'a.onnx')]) == 1
    assert "pip install 'mmhybrid[onnx]'" in capsys.readouterr().err
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    assert main(['predict', str(tmp_path / 'a.png'), '--weights', str(path)]) == 1
    assert 'pip install onnxruntime' in capsys.readouterr().err


def test_a_file_of_others_is_told(tmp_path):
    import onnx
    from onnx import TensorProto, helper
    x = helper.make_tensor_value_info('x', TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info('y', TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10),
              tmp_path / 'a.onnx')
    with pytest.raises(mmhybrid.errors.UserError, match='not written by `mmhybrid export`'):
        OnnxPredictor(tmp_path / 'a.onnx')


def test_masks_are_pasted_as_mmdet_does():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    noise = torch.Generator().manual_seed(0)
    mask = torch.rand(28, 28, generator=noise)
    for box in ([3.2, 4.7, 40.1, 33.3], [-2., 0., 64., 48.], [10., 10., 10.4, 30.]):
        right, (rows, columns) = _do_paste_mask(mask[None, None], torch.tensor([box]), 48, 64)
        whole = np.zeros((48, 64), np.float32)
        whole[rows, columns] = right[0].numpy()
        ours = onnx_file.paste(mask.numpy(), np.array(box, np.float32), (48, 64))
        np.testing.assert_allclose(ours, whole, atol=2e-5)
    assert not onnx_file.paste(mask.numpy(), np.zeros(4, np.float32), (48, 64)).any()


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(31, 50), (7, 5), (1, 1)])
def test_classes_after_a_resize_are_those_of_pytorch(align_corners, size):
    logits = torch.randn(1, 6, 9, 13, generator=torch.Generator().manual_seed(0))
    right = F.interpolate(logits, size, mode='bilinear', align_corners=align_corners).argmax(1)[0]
    ours = onnx_file._likeliest(logits[0].numpy(), size, align_corners)
    assert np.array_equal(ours, right.numpy())
