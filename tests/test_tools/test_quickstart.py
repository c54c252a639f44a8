"""The script around the tools, with a stand-in for Python that only writes down what it is asked.

The real thing takes minutes; .ci/run does it once, shortened.
"""
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
args = sys.argv[1:]
with open({calls!r}, 'a') as file:
    file.write(json.dumps(args) + '\\n')
if args[0] == '-':  # the summary, a program on standard input
    os.execv({python!r}, [{python!r}, *args])
tool = Path(args[0]).name
if tool == os.environ.get('FAIL'):
    print(tool, 'says why', file=sys.stderr)
    sys.exit(1)
value = lambda flag: Path(args[args.index(flag) + 1])
if tool == 'train.py':
    work = value('--work-dir')
    checkpoint = work / 'epoch_1.pth'
    checkpoint.write_text('')
    (work / 'last_checkpoint').write_text(str(checkpoint))
    (work / 'run').mkdir()
    (work / 'run' / 'run.log').write_text('')
elif tool == 'test.py':
    (value('--work-dir') / 'run').mkdir(parents=True)
    (value('--work-dir') / 'run' / 'run.json').write_text(os.environ['METRICS'])
"""


@pytest.fixture
def quickstart(tmp_path):
    """Run the script of a copied clone; returns the finished process and the calls of Python."""
    clone = tmp_path / 'clone'
    (clone / 'tools').mkdir(parents=True)
    script = clone / 'tools' / 'quickstart.sh'
    script.write_bytes((ROOT / 'tools' / 'quickstart.sh').read_bytes())
    calls = tmp_path / 'calls'
    stand_in = tmp_path / 'python'
    stand_in.write_text(STAND_IN.format(python=sys.executable, calls=str(calls)))
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)

    # What the caller set for runs of their own must not reach these.
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith('QUICKSTART_')}

    def run(*args, **environment):
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ['bash', str(script), *args], capture_output=True, text=True, cwd=tmp_path,
            env={**inherited, 'QUICKSTART_PYTHON': str(stand_in), 'METRICS': '{}', **environment})
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


DETECTION = '{"coco/bbox_mAP": 0.5, "coco/segm_mAP": 0.25}'
SEGMENTATION = '{"mIoU_present": 48.5, "mIoU_majority": 4.07, "classes_present": 11}'


def _call(calls, tool):
    (call,) = [each for each in calls if each[0].endswith(tool)]
    return call


def test_detection_prints_what_it_reached_and_where(quickstart, tmp_path):
    done, calls = quickstart(METRICS=DETECTION)
    assert done.returncode == 0, done.stderr
    assert _call(calls, 'prepare_data.py')[1] == 'mini-coco'
    train = _call(calls, 'train.py')
    assert train[1] == 'configs/cascade_mambavision_mini_coco.py'
    # Nothing of the recipe is changed; the evaluation comes after it.
    assert train[train.index('--cfg-options') + 1:] == ['train_cfg.val_interval=1000']
    work = train[train.index('--work-dir') + 1]
    test, pictures = _call(calls, 'test.py'), _call(calls, 'visualize.py')
    # Evaluated and drawn with the config as it was trained.
    assert test[1:3] == pictures[1:3] == [
        f'{work}/cascade_mambavision_mini_coco.py', f'{work}/epoch_1.pth']
    for line in ('box AP     0.500', 'mask AP    0.250', f'pictures   {work}/pictures/',
                 f'checkpoint {work}/epoch_1.pth', f'log        {work}/run/run.log'):
        assert line in done.stdout
    assert 'time       0 min' in done.stdout


def test_segmentation_prints_the_baseline(quickstart):
    done, calls = quickstart('segmentation', METRICS=SEGMENTATION)
    assert done.returncode == 0, done.stderr
    assert _call(calls, 'train.py')[1] == 'configs/upernet_mambavision_mini_ade20k.py'
    assert 'mIoU       0.485 over the 11 classes present' in done.stdout
    assert 'baseline   0.041' in done.stdout


def test_a_model_without_detections_is_told_as_such(quickstart):
    done, _ = quickstart(METRICS='{"time": 0.1}')
    assert done.returncode == 0, done.stderr
    assert 'No object was found' in done.stdout and 'box AP     0.000' in done.stdout


def test_runs_do_not_share_a_folder(quickstart):
    folders = set()
    for _ in range(2):
        _, calls = quickstart(METRICS=DETECTION)
        train = _call(calls, 'train.py')
        folders.add(train[train.index('--work-dir') + 1])
    assert len(folders) == 2


@pytest.mark.parametrize('iterations, epochs, images', [(20, 1, 160), (60, 1, 480), (100, 2, 400)])
def test_a_shortened_detection_run(quickstart, iterations, epochs, images):
    _, calls = quickstart(METRICS=DETECTION, QUICKSTART_ITERS=str(iterations))
    train = _call(calls, 'train.py')
    assert train[train.index('--cfg-options') + 1:] == [
        'train_cfg.val_interval=1000', f'train_cfg.max_epochs={epochs}',
        f'train_dataloader.dataset.indices={images}']
    assert epochs * images == iterations * 8


def test_the_shortened_runs_fit_the_configs():
    from mmengine.config import Config

    from mmhybrid.datasets import mini_coco
    cfg = Config.fromfile(ROOT / 'configs/cascade_mambavision_mini_coco.py')
    assert cfg.train_dataloader.batch_size == 8 and mini_coco.TRAIN == 480


def test_own_options_join_those_of_a_shortened_run(quickstart):
    _, calls = quickstart('segmentation', '--cfg-options', 'a=1', 'b=2', METRICS=SEGMENTATION,
                          QUICKSTART_ITERS='5')
    train = _call(calls, 'train.py')
    assert train.count('--cfg-options') == 1
    assert train[train.index('--cfg-options') + 1:] == [
        'train_cfg.val_interval=1000000', 'train_cfg.max_iters=5',
        'default_hooks.checkpoint.interval=5', 'a=1', 'b=2']


@pytest.mark.parametrize('args, environment, complaint', [
    (['classification'], {}, "unknown task 'classification'"),
    (['--work-dir', 'x'], {}, '--work-dir is chosen by this script'),
    ([], {'QUICKSTART_ITERS': '0'}, "QUICKSTART_ITERS is '0'; expected a positive"),
    ([], {'QUICKSTART_PYTHON': '/nowhere/python'}, 'cannot import mmengine and torch'),
    ([], {'FAIL': 'prepare_data.py'}, 'the data set could not be made'),
    ([], {'FAIL': 'train.py'}, 'training stopped'),
    ([], {'FAIL': 'test.py'}, 'the evaluation of'),
    ([], {'FAIL': 'visualize.py'}, 'the pictures could not be drawn'),
])
def test_failures_are_sentences(quickstart, args, environment, complaint):
    done, _ = quickstart(*args, **environment)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('[quickstart] ERROR: ')


def test_what_draws_beside_the_evaluation_is_heard(quickstart):
    done, calls = quickstart(METRICS=DETECTION, FAIL='visualize.py')
    assert done.returncode == 1
    assert 'visualize.py says why' in done.stderr
    assert _call(calls, 'test.py')


def test_help(quickstart):
    done, calls = quickstart('--help')
    assert done.returncode == 0 and not calls
    assert 'bash tools/quickstart.sh [detection|segmentation]' in done.stdout
