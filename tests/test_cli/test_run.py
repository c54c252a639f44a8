"""`mmhybrid run`: stock tools, scripts and modules with our plugin."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmhybrid import cli
from mmhybrid.cli import run as run_module
from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
from mmhybrid.datasets.mini_coco import write_mini_coco

SAY = 'import sys\nprint(__name__, __file__, sys.argv[1:])\n'


@pytest.fixture(autouse=True)
def _process_state(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['mmhybrid'])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setenv('MPLBACKEND', 'Agg')


def shipped(package, name):
    pytest.importorskip(package)
    tool = f'{package}.tools.{name}'
    if run_module._shipped(tool) is None:
        pytest.skip(f'this {package} brings no {name}')
    return tool


# --- tools of mmdet and mmseg -------------------------------------------------------------------


@pytest.fixture
def detection(tmp_path):
    """A config that builds on ours by the prefix, and predictions of its set."""
    write_mini_coco(tmp_path / 'set', train=2, val=2)
    (tmp_path / 'mine.py').write_text(
        f"_base_ = 'mmhybrid::cascade_mambavision_mini_coco.py'\ndata_root = '{tmp_path}/set/'\n"
        "train_dataloader = dict(dataset=dict(data_root=data_root))\n"
        # the matrix has a text in every field
        "val_dataloader = dict(\n"
        "    dataset=dict(data_root=data_root, metainfo=dict(classes=('cup',))))\n"
        "test_dataloader = val_dataloader\n")
    box = dict(bboxes=torch.tensor([[4.0, 4, 40, 40]]), scores=torch.tensor([0.9]),
               labels=torch.tensor([0]))
    with open('found.pkl', 'wb') as file:
        pickle.dump([dict(pred_instances=box)] * 2, file)
    return 'mine.py'


@pytest.mark.parametrize('process', [
    'this one', pytest.param('another', marks=pytest.mark.slow)])
def test_confusion_matrix(detection, process, capfd):
    command = ['run', shipped('mmdet', 'analysis_tools.confusion_matrix'), detection, 'found.pkl',
               'out']
    if process == 'this one':
        assert cli.main(command) == 0, capfd.readouterr().err
    else:
        done = subprocess.run([sys.executable, '-m', 'mmhybrid', *command], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
    assert Path('out/confusion_matrix.png').stat().st_size > 1000


def test_browse_a_detection_set(detection, capfd):
    tool = shipped('mmdet', 'analysis_tools.browse_dataset')
    command = ['run', tool, detection, '--not-show', '--output-dir', 'shown']
    assert cli.main(command) == 0, capfd.readouterr().err
    assert len(list(Path('shown').iterdir())) == 2


def test_browse_a_segmentation_set(tmp_path, capfd):
    tool = shipped('mmseg', 'analysis_tools.browse_dataset')
    import mmseg
    if mmseg.__version__ == '1.2.2':
        pytest.skip('its visualizer gives OpenCV an array with its axes in another order')
    write_mini_ade20k(tmp_path / 'set', train=2, val=2)
    root = f'{tmp_path}/set/'
    # Its own training pipeline makes the labels smaller than the image, which nobody can overlay.
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'mmhybrid::upernet_mambavision_mini_ade20k.py'\n"
        f"train_dataloader = dict(dataset=dict(data_root='{root}', pipeline=[dict(type=name) for "
        "name in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs')]))\n")
    command = ['run', tool, 'mine.py', '--not-show', '--output-dir', 'shown']
    assert cli.main(command) == 0, capfd.readouterr().err
    assert len(list(Path('shown').iterdir())) == 2


def test_analyze_logs(capfd):
    tool = shipped('mmdet', 'analysis_tools.analyze_logs')
    if 'seaborn' in Path(run_module._shipped(tool)).read_text():
        pytest.importorskip('seaborn')
    Path('log.json').write_text('\n'.join(json.dumps(dict(
        lr=0.1, data_time=0.1, loss=1 / step, loss_cls=1.0, epoch=1, time=0.5, memory=100,
        step=step)) for step in range(1, 5)))
    assert cli.main(['run', tool, 'cal_train_time', 'log.json']) == 0, capfd.readouterr().err
    assert 'average iter time: 0.5000 s/iter' in capfd.readouterr().out


# --- scripts and modules ------------------------------------------------------------------------


def test_a_script_gets_its_arguments_and_neighbours(tmp_path, capsys):
    folder = tmp_path / 'deep'
    folder.mkdir()
    (folder / 'beside.py').write_text("there = 'found'\n")
    (folder / 'tool.py').write_text(SAY + 'import beside\nprint(beside.there)\n')
    assert cli.main(['run', 'deep/tool.py', '--help', '-x', '--', 'y', '--traceback']) == 0
    assert capsys.readouterr().out.splitlines() == [
        "__main__ deep/tool.py ['--help', '-x', '--', 'y', '--traceback']", 'found']


def test_a_module_of_the_working_directory(tmp_path, capsys):
    (tmp_path / 'own_package').mkdir()
    (tmp_path / 'own_package/__init__.py').write_text('')
    (tmp_path / 'own_package/tool.py').write_text(SAY)
    assert cli.main(['run', 'own_package.tool', '1']) == 0
    assert capsys.readouterr().out == f"__main__ {tmp_path}/own_package/tool.py ['1']\n"


@pytest.mark.parametrize(('end', 'status'), [('sys.exit(3)', 3), ('sys.exit()', None)])
def test_the_tool_says_how_it_ends(tmp_path, end, status):
    (tmp_path / 'tool.py').write_text(f'import sys\n{end}\n')
    with pytest.raises(SystemExit) as stopped:
        cli.main(['run', 'tool.py'])
    assert stopped.value.code == status


def test_an_error_of_the_tool_keeps_its_traceback(tmp_path, capsys):
    (tmp_path / 'tool.py').write_text("raise KeyError('its own')\n")
    assert cli.main(['run', 'tool.py']) == 1
    error = capsys.readouterr().err
    assert "KeyError: 'its own'" in error and 'tool.py", line 1' in error


@pytest.mark.parametrize(('tool', 'words'), [
    ('gone.py', 'There is no script gone.py'), ('no_such.module', 'no_such.module cannot be run'),
    ('not-a-name', 'neither a file that ends in .py, nor a module'),
    ('mmdet.tools.analysis_tools.confusion_matrx', 'mmdet.tools.analysis_tools.confusion_matrix'),
    ('mmdet.tools', 'mmdet brings mmdet.tools.')])
def test_what_cannot_be_run_is_said(tool, words, capsys):
    if tool.startswith('mmdet'):
        shipped('mmdet', 'train')
    assert cli.main(['run', tool]) == 1
    error = capsys.readouterr().err
    assert words in error and 'Traceback' not in error


def test_without_a_tool_it_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(['run'])
    assert end.value.code == 2
