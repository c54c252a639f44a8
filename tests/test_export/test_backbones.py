"""Backbones and necks as ONNX files: the maps of onnxruntime are those of PyTorch."""
import numpy as np
import pytest
import torch
from backbone_cases import CASES, build
from mmengine.registry import MODELS

from mmhybrid.errors import UserError
from mmhybrid.export.networks import Features

pytest.importorskip('onnx'), pytest.importorskip('onnxscript'), pytest.importorskip('onnxruntime')
command = pytest.importorskip('mmhybrid.export.command')
BLOCKS = dict(depths=(1, 1, 1, 1), depth=2)
FEW = {'MambaVision-tiny': dict(depths=(1, 1, 2, 1)), 'VMamba-tiny_s1l8': {}, 'Vim-tiny': {},
       'LocalVMamba-tiny': {}, 'LocalVim-tiny': {}}
IN_EVERY_RUN = ('Vim-tiny',)  # MambaVision is in test_whole.py


def few_blocks(case):
    """A backbone with as few blocks as have one of each kind."""
    cls, arguments = case.values
    arch = dict(arguments['arch'])
    arch.update({key: value for key, value in {**BLOCKS, **FEW[case.id]}.items() if key in arch})
    changes = dict(arch=arch)
    if 'depth' in arch:
        changes['out_indices'] = (1,)
    if 'directions' in arguments:
        blocks = sum(arch['depths']) if 'depths' in arch else arch['depth']
        changes['directions'] = [('h', 'v_flip'), ('w2', 'w7_flip')] * 2
        changes['directions'] = changes['directions'][:blocks]
    return Features(build(cls, arguments, **changes)).eval()


def exported(network, path, batch, size, any_size=False):
    inputs = command.example(False, batch, size)
    command.write(network, inputs, dict(size=None if any_size else size, version='0'), path)
    return inputs


def case(name):
    return next(each for each in CASES if each.id == name)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in FEW
    if name != 'VMamba-tiny_s1l8'])
def test_maps_of_an_odd_size(name, tmp_path):
    network = few_blocks(case(name))
    inputs = exported(network, tmp_path / 'a.onnx', 1, (75, 53))
    assert command.difference(tmp_path / 'a.onnx', network, inputs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', ['VMamba-tiny_s1l8'])
def test_one_file_for_any_batch_and_size(name, tmp_path):
    from mmhybrid.prediction.onnx_file import open_session
    network = few_blocks(case(name))
    inputs = exported(network, tmp_path / 'a.onnx', 2, (96, 64), any_size=True)
    assert command.difference(tmp_path / 'a.onnx', network, inputs) < 1e-4
    session = open_session(tmp_path / 'a.onnx')
    for shape in ((1, 3, 32, 32), (1, 3, 75, 53), (3, 3, 33, 161), (2, 3, 128, 256)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = network(image)
        for right, got in zip(expected, session.run(None, {'image': image.numpy()}), strict=True):
            assert got.shape == right.shape
            assert np.abs(got - right.numpy()).max() < 1e-4 * right.abs().max(), shape


@pytest.mark.slow
@pytest.mark.parametrize(('cls', 'arguments'), CASES)
@pytest.mark.parametrize('area', [(64, 96), (75, 53)])
def test_every_backbone(cls, arguments, area, tmp_path):
    network = Features(build(cls, arguments)).eval()
    inputs = exported(network, tmp_path / 'a.onnx', 2, area)
    assert command.difference(tmp_path / 'a.onnx', network, inputs) < 1e-4


@pytest.mark.slow
def test_half_precision_whole_numbers_and_openvino(tmp_path):
    from mmhybrid.export.smaller import to_half, to_int8
    network = Features(build(*case('MambaVision-tiny').values)).eval()
    path = tmp_path / 'a.onnx'
    inputs = exported(network, path, 1, (75, 53))
    half, int8 = to_half(path, tmp_path / 'h.onnx'), to_int8(path, tmp_path / 'i.onnx')
    assert command.difference(half, network, inputs) < 5e-3
    assert command.difference(int8, network, inputs) < 0.1
    assert int8.stat().st_size < 0.5 * path.stat().st_size
    openvino = pytest.importorskip('openvino')
    compiled = openvino.compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    with torch.no_grad():
        expected = network(*inputs)
    for right, got in zip(expected, compiled(inputs[0].numpy()).values(), strict=True):
        assert np.abs(got - right.numpy()).max() < 1e-4 * right.abs().max()


@pytest.mark.slow
def test_a_neck_behind_a_backbone_for_any_size(tmp_path):
    pytest.importorskip('mmdet')
    import mmdet.models  # noqa: F401  registers FPN
    backbone = few_blocks(case('VMamba-tiny_s1l8')).backbone
    neck = MODELS.build(dict(type='mmdet.FPN', in_channels=list(backbone.out_channels),
                             out_channels=8, num_outs=5))
    network = Features(backbone, neck).eval()
    inputs = exported(network, tmp_path / 'a.onnx', 2, (96, 64), any_size=True)
    assert command.difference(tmp_path / 'a.onnx', network, inputs) < 1e-4


@pytest.mark.parametrize(('name', 'changes', 'part', 'reason'), [
    ('Vim-tiny', {}, 'backbone', r'Vim, --part backbone\): its last patches'),
    ('LocalVim-tiny', {}, 'neck', 'windows overhang'),
    ('LocalVMamba-tiny', {}, 'backbone', 'windows overhang'),
    ('MambaVision-tiny', {}, 'backbone', 'windows of several pictures'),
    ('VMamba-v0_tiny', {}, 'backbone', "downsample='v1'"),
    ('VMamba-tiny_s1l8', {}, 'whole', 'heads of a whole model')])
def test_what_has_one_size_is_refused_for_any(name, changes, part, reason):
    cls, arguments = case(name).values
    with pytest.raises(UserError, match=reason):
        command.check_dynamic(cls(**arguments | changes), part)


@pytest.mark.parametrize('name', ['VMamba-tiny_s1l8'])
def test_what_may_have_any_size_is_not(name):
    cls, arguments = case(name).values
    command.check_dynamic(cls(**arguments), 'backbone')
