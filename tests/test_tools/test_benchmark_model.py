"""The benchmark of whole models, end to end on shrunken configs, and what it refuses."""
import csv
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from shrink import shrink

from mmhybrid.analysis.models.source import find_model
from mmhybrid.cli.actions.running import run_command

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'tools/benchmark'


@pytest.fixture(scope='module')
def tool():
    sys.path.insert(0, str(FOLDER))
    try:
        return Namespace(**runpy.run_path(str(FOLDER / 'model.py')))
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Path of a shrunken config."""
    folder = tmp_path_factory.mktemp('small')

    def make(name):
        path = folder / f'{name}.py'
        if not path.exists():
            shrink(Config.fromfile(ROOT / f'configs/{name}.py')).dump(path)
        return str(path)
    return make


def options(**changed):
    return Namespace(**{**dict(
        batch=1, dtype='float32', device='cpu', compile=False, backbone_only=False, train=False,
        warm_up=1), **changed})


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_detectors_take_turns(tool, small, tmp_path, capsys):
    path = tmp_path / 'results.csv'
    names = ['mask_rcnn_vmamba_t_coco', 'cascade_mambavision_t_coco']
    tool.main(['--compare', *map(small, names), '--shape', '96', '128', '--turns', '3',
               '--warm-up', '1', '--csv', str(path)])
    text = capsys.readouterr().out
    assert 'inference, batch 1, float32' in text and 'peak memory: live tensors' in text
    rows = rows_of(path)
    assert [row['model'] for row in rows] == names
    assert tuple(rows[0]) == tool.COLUMNS
    assert rows[0]['time_over_first'] == '1.000' and float(rows[1]['time_over_first']) > 0
    for row in rows:
        assert row['device'] and row['torch'] == torch.__version__ and row['commit']
        assert (row['pass'], row['height'], row['width']) == ('inference', '96', '128')
        assert 0 < float(row['p20_ms']) <= float(row['p50_ms']) <= float(row['p80_ms'])
        assert float(row['images_per_s']) == pytest.approx(1e3 / float(row['p50_ms']), rel=1e-2)
        # weights are part of it
        assert float(row['peak_mb']) > 4e-6 * int(row['parameters']) > 1


def test_the_heads_of_an_untrained_detector_have_work(tool, small):
    case = tool.make_case(find_model(small('mask_rcnn_vmamba_t_coco')), (96, 128), options())
    result, = case.call()
    assert len(result.pred_instances) == 5  # as many as the small config keeps
    assert result.pred_instances.masks.shape[1:] == (96, 128)


@pytest.mark.parametrize('name', ['cascade_mambavision_t_coco', 'upernet_vmamba_t_ade20k'])
def test_training_step(tool, small, name):
    source = find_model(small(name))
    case = tool.make_case(source, (64, 64), options(train=True, batch=2))
    assert torch.isfinite(case.call())
    groups = case.call.optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.0, 0.05 if 'coco' in name else 0.01}
    # weights, gradients and two moments are there at once, and activations on top
    assert case.peak > 16 * case.parameters
    weight = groups[0]['params'][0]
    before = weight.detach().clone()
    case.call()
    assert weight.grad.abs().sum() > 0 and torch.equal(weight, before)


@pytest.mark.parametrize(('spec', 'backbone_only', 'kind'), [
    ('upernet_vmamba_t_ade20k', True, tuple), ('VMambaClassifier:tiny', False, torch.Tensor)])
def test_parts_and_classifiers_in_half_precision(tool, small, spec, backbone_only, kind):
    source = find_model(spec if ':' in spec else small(spec), backbone_only=backbone_only)
    arguments = options(dtype='bfloat16', backbone_only=backbone_only)
    case = tool.make_case(source, (64, 64), arguments)
    out = case.call()
    assert isinstance(out, kind)
    if kind is torch.Tensor:
        assert out.dtype == torch.bfloat16 and out.shape == (1, 1000)
    arguments.train = True
    loss = tool.make_case(source, (64, 64), arguments).call()
    assert loss.dim() == 0 and torch.isfinite(loss)


def test_the_backbone_is_what_is_compiled(tool, small, monkeypatch):
    compiled, runs = [], []

    def stand_in(function):
        compiled.append(function.__self__)
        return lambda *args: runs.append(1) or function(*args)

    monkeypatch.setattr(torch, 'compile', stand_in)
    case = tool.make_case(find_model(small('upernet_vmamba_t_ade20k')), (64, 64),
                          options(compile=True))
    assert [type(module).__name__ for module in compiled] == ['VMamba'] and runs
    assert case.peak is None  # what compiled code allocates cannot be seen


def test_live_tensors(tool):
    live = tool.LiveTensors()
    with live:
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes live
        del a
        view = b[10:]
        c = view * 2  # again 8000, less 40
        del b, view
    assert live.peak == 8000 and live.now == c.untyped_storage().nbytes() == 3960
    del c
    assert live.now == 0


def test_ratios(tool):
    assert tool.ratio_spread([2.0], [1.0]) == '2.000'
    # by turns: a slow turn of the machine hits both
    assert tool.ratio_spread([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == '2.000 (2.000 to 2.120)'


@pytest.mark.parametrize(('arguments', 'parts'), [
    ([], ['Nothing to measure', '--compare']),
    (['VMamba:tiny', '--dtype', 'float64'], ["'float64'", 'float32, float16, bfloat16']),
    (['VMamba:tiny', '--device', 'gpu'], ["'gpu'", 'expected cpu or cuda']),
    (['VMamba:tiny', '--device', 'mps'], ["'mps'", 'expected cpu or cuda']),
    (['VMamba:tiny', '--dtype', 'float16', '--train'], ['loss scaling', 'Use --dtype bfloat16']),
    (['VMamba:tiny', '--clock', 'cuda'], ['this run is on the CPU', 'Use wall or cpu']),
    (['VMamba:tiny', '--batch', '0'], ['--batch got 0', 'at least 1']),
    (['VMamba:tiny', '--warm-up', '0'], ['--warm-up got 0', 'tables']),
    (['VMamba:tinny'], ['VMamba:tinny cannot be built', "arch='tinny'"]),
    (['configs/nothing.py'], ['There is no config configs/nothing.py']),
    (['VMamba:tiny', '--compare', str(ROOT / 'configs/upernet_vmamba_t_ade20k.py')],
     ['different usual image sizes', 'give --shape']),
    (['VMamba:tiny', '--csv', str(ROOT / 'configs/complexity.md')], ['has other columns']),
])
def test_errors_finish_the_sentence(tool, capfd, arguments, parts):
    assert run_command(tool.main, arguments) == 1
    error = capfd.readouterr().err
    assert 'Traceback' not in error
    for part in parts:
        assert part in error


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there(tool, capfd):
    assert run_command(tool.main, ['VMamba:tiny', '--device', 'cuda']) == 1
    assert 'needs a GPU that PyTorch can use' in capfd.readouterr().err
