"""The stand-in for mmcv._ext says what it is, to whoever asks and in whatever way."""
import copy
import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import pydoc
import sys

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('mmcv')
pytest.importorskip('torchvision')

import mmhybrid.plugin  # noqa: F401  installs the finder
from mmhybrid import mmcv_ops

pytestmark = pytest.mark.skipif(
    mmcv_ops.implementation() == 'compiled', reason='compiled mmcv operators are installed')
COMPUTED = {'nms', 'roi_align_forward', 'roi_align_backward', 'sigmoid_focal_loss_forward',
            'sigmoid_focal_loss_backward', 'ms_deform_attn_forward', 'ms_deform_attn_backward'}
REPORTS = {'get_compiler_version', 'get_compiling_cuda_version'}


@pytest.fixture
def ext():
    return importlib.import_module('mmcv._ext')


def test_it_says_what_it_is(ext):
    assert ext.IS_STAND_IN is True
    assert not hasattr(ext, '__file__') and ext.__spec__.origin == 'mmhybrid.mmcv_ops'
    assert 'Not the compiled module of mmcv' in ext.__doc__
    assert repr(ext) == "<module 'mmcv._ext' (mmhybrid.mmcv_ops)>"
    assert mmcv_ops.implementation() == 'torchvision'


def test_versions_of_what_did_not_compile_it():
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version
    assert get_compiler_version() == (
        "none (mmcv is not compiled; mmhybrid's torchvision stand-in)")
    assert get_compiling_cuda_version() == 'not available'
    collect = pytest.importorskip('mmcv.utils.env').collect_env
    report = collect()
    assert report['MMCV Compiler'].startswith('none (mmcv is not compiled')
    assert report['MMCV CUDA Compiler'] == 'not available'


@pytest.mark.parametrize('name', ['softnms', 'deform_conv_forward', 'nms_rotated', 'whatever'])
def test_an_operator_that_is_lacking_raises_one_sentence_when_it_is_called(ext, name):
    operator = getattr(ext, name)
    for arguments in ((), (torch.ones(1), 2)):
        with pytest.raises(mmcv_ops.CompiledOpMissing) as caught:
            operator(*arguments, odd=None)
        said = str(caught.value)
        assert said.startswith(f"mmcv's operator '{name}' was called, which exists only in comp")
        assert mmcv_ops.compile_command() in said and '`mmhybrid doctor`' in said
        assert '\n' not in said and '. ' not in said
    assert isinstance(caught.value, NotImplementedError)


def test_every_operator_that_mmcv_asks_for_is_there():
    """Importing all of mmcv.ops, which insists that they are, and its public names."""
    ops = importlib.import_module('mmcv.ops')
    for name in ('nms', 'batched_nms', 'soft_nms', 'RoIAlign', 'DeformConv2d', 'SyncBatchNorm',
                 'MultiScaleDeformableAttention', 'point_sample', 'ModulatedDeformConv2d'):
        assert hasattr(ops, name), name
    from mmcv.utils import ext_loader
    loaded = ext_loader.load_ext('_ext', ['nms', 'softnms', 'modulated_deform_conv_forward'])
    assert loaded is sys.modules['mmcv._ext']


@pytest.mark.parametrize('name', ['__path__', '__wrapped__', '__file__', '_private', 'WITH_CUDA',
                                  'MMCV_WITH_OPS', '__deepcopy__', 'Tensor'])
def test_what_is_no_operator_is_not_there(ext, name):
    assert not hasattr(ext, name)
    with pytest.raises(AttributeError, match=f"'mmcv._ext', mmhybrid's stand-in, has no '{name}'"):
        getattr(ext, name)


@pytest.mark.parametrize('caller', ['mmcv.ops.nms', 'mmcv.utils.ext_loader', 'other', '__main__'])
def test_the_answer_is_the_same_for_every_caller(caller):
    space = {'__name__': caller, '__file__': f'/{caller}.py'}
    exec('import mmcv._ext as e\n'
         'found = [hasattr(e, x) for x in ("nms", "softnms", "WITH_CUDA", "__file__")]\n'
         'flag = e.IS_STAND_IN', space)
    assert space['found'] == [True, True, False, False] and space['flag'] is True


def test_looking_at_it_does_not_change_it(ext):
    before = dir(ext)
    assert COMPUTED | REPORTS | {'IS_STAND_IN', '__doc__'} <= {*before}
    assert ext.softnms is ext.softnms and hasattr(ext, 'ball_query_forward')
    names = {name for name, _ in inspect.getmembers(ext, callable) if not name.startswith('_')}
    assert dir(ext) == before and names == COMPUTED | REPORTS
    space = {}
    exec('from mmcv._ext import *', space)
    assert {*space} - {'__builtins__'} == COMPUTED | REPORTS | {'IS_STAND_IN'}
    exec('from mmcv._ext import softnms', space)
    assert space['softnms'] is ext.softnms


def test_inspect_and_pydoc(ext):
    for ask in (inspect.getfile, inspect.getsource, inspect.getsourcefile):
        with pytest.raises(TypeError, match='built-in module'):
            ask(ext)
    assert inspect.ismodule(ext) and inspect.unwrap(ext.softnms) is ext.softnms
    assert inspect.getmodule(ext.softnms) is ext and ext.softnms.__module__ == 'mmcv._ext'
    assert str(inspect.signature(ext.nms)) == '(boxes, scores, iou_threshold, offset)'
    assert 'exists only in compiled mmcv' in inspect.getdoc(ext.softnms)
    assert 'Not the compiled module' in pydoc.render_doc(ext)


def test_pickle_and_copy(ext):
    for name in (*COMPUTED, *REPORTS, 'softnms'):
        operator = getattr(ext, name)
        assert pickle.loads(pickle.dumps(operator)) is operator
        assert copy.copy(operator) is operator and copy.deepcopy(operator) is operator
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match='module'):  # as every module
            copied(ext)
    error = mmcv_ops.CompiledOpMissing('text')
    assert str(pickle.loads(pickle.dumps(error))) == 'text'  # it crosses processes


def test_reload(ext):
    operator = ext.softnms
    assert importlib.reload(ext) is ext and sys.modules['mmcv._ext'] is ext
    assert ext.IS_STAND_IN and not hasattr(ext, '__file__') and ext.softnms is operator
    assert mmcv_ops.implementation() == 'torchvision'


def test_reload_of_what_makes_it(ext, monkeypatch):
    """Notebooks do; another class then has the same name."""
    finders = list(sys.meta_path)
    names = dict(vars(mmcv_ops))
    try:
        again = importlib.reload(mmcv_ops)
        assert again.implementation() == 'torchvision'
        monkeypatch.delitem(sys.modules, 'mmcv._ext')
        assert again.implementation() == 'torchvision'  # by the finder alone
        again.install()
        assert sys.meta_path == finders
    finally:
        vars(mmcv_ops).update(names)


def test_probes_of_the_other_packages():
    assert importlib.util.find_spec('mmcv._ext').origin == 'mmhybrid.mmcv_ops'
    assert 'mmcv._ext' not in {each.name for each in pkgutil.walk_packages(
        importlib.import_module('mmcv').__path__, 'mmcv.', onerror=lambda name: None)
        if each.name.count('.') == 1}
    from mmengine.utils import digit_version
    from mmengine.utils.dl_utils.misc import mmcv_full_available
    mmcv = importlib.import_module('mmcv')
    assert digit_version(mmcv.__version__) >= digit_version('2.0.0rc4')
    assert mmcv_full_available() is True
    assert not hasattr(mmcv, 'MMCV_WITH_OPS') or isinstance(mmcv.MMCV_WITH_OPS, bool)
    importlib.import_module('mmdet')  # compares versions
    importlib.import_module('mmseg')


def test_doctor_tells_the_same():
    from mmhybrid import doctor, doctor_probes
    facts = doctor_probes.operators()
    assert facts['implementation'] == 'torchvision' and facts['cuda'] == 'not available'
    assert facts['compiler'].startswith('none (mmcv is not compiled')
    row = doctor._operators_row({'mmcv': {'ok': True}, 'operators': {'ok': True, **facts}})
    assert row.found == 'torchvision stands in for mmcv._ext (nms, roi_align)'
    assert row.state == doctor.NOTE and mmcv_ops.compile_command() in row.remedy
