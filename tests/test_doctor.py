"""The doctor's judgement on simulated installations, and a few runs of the real command."""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmhybrid import cli, doctor

ROOT = Path(__file__).resolve().parents[1]


def failed(error, **more):
    return {'ok': False, 'error': error, 'where': '', **more}


def missing(name):
    return failed(f"ModuleNotFoundError: No module named '{name}'")


HEALTHY = {
    'python': [3, 11, 7],
    'distributions': {
        'mmengine': ['onedl-mmengine 0.10.12'],
        'mmcv': ['onedl-mmcv 2.3.6'],
        'mmdet': ['onedl-mmdetection 3.5.1'],
        'mmseg': ['onedl-mmsegmentation 1.4.2'],
    },
    'nvidia_driver': False,
    'importable': dict.fromkeys(
        ['torch', 'torchvision', 'triton', 'numpy', 'cv2', 'pycocotools',
         'mmengine', 'mmcv', 'mmdet', 'mmseg'], True,
    ),
    'torch': {'ok': True, 'version': '2.11.0+cu130', 'cuda': '13.0', 'hip': None},
    'gpu': {'ok': True, 'names': []},
    'torchvision': {'ok': True, 'version': '0.26.0'},
    'triton': {'ok': True, 'version': '3.6.0'},
    'scan': {
        'ok': True,
        'backends': {'triton': [False, 'PyTorch sees no GPU'], 'torch': [True, '']},
        'chosen': {'cpu': 'torch'},
    },
    'numpy': {'ok': True, 'version': '2.2.6'},
    'opencv': {'ok': True, 'version': '4.12.0'},
    'mmengine': {'ok': True, 'version': '0.10.12'},
    'checkpoints': {'ok': True},
    'mmcv': {'ok': True, 'version': '2.3.6'},
    'mmhybrid': {'ok': True, 'version': '0.1.0', 'path': '/p/mmhybrid', 'configs': '/p/configs'},
    'patches': {'ok': True, 'active': ['mmcv-operators', 'pipelines'], 'off': [], 'hook': [],
                'in_commands': ['image-files'], 'variable': 'MMHYBRID_WITHOUT'},
    'operators': {'ok': True, 'implementation': 'torchvision', 'compile_command': 'pip COMPILE'},
    'mmdet': {'ok': True, 'version': '3.5.1'},
    'pycocotools': {'ok': True},
    'mmseg': {'ok': True, 'version': '1.4.2'},
    'step': {'ok': True, 'device': 'cpu', 'seconds': 0.5},
}

COMPILED = {'ok': True, 'implementation': 'compiled', 'compiler': 'GCC 13.2', 'cuda': '12.8'}


def facts(**changes):
    changed = copy.deepcopy(HEALTHY)
    for key, value in changes.items():
        changed[key] = {**changed[key], **value} if key in (
            'distributions', 'importable') else value
    return changed


def problems(some_facts, tasks=doctor.TASKS):
    rows = doctor.diagnose(some_facts, tasks)
    for row in rows:
        assert row.state == doctor.OK or row.remedy, f'{row.what} has no remedy'
    return {row.what: row for row in rows if row.state == doctor.PROBLEM}


def row_of(some_facts, what):
    (row,) = (row for row in doctor.diagnose(some_facts) if row.what == what)
    return row


def test_healthy_installation_has_no_problem():
    assert problems(facts()) == {}
    text = doctor.render(doctor.diagnose(facts()))
    for part in ('2.11.0', '0.26.0', '3.6.0', 'onedl-mmcv 2.3.6', 'torchvision stands in'):
        assert part in text
    assert 'Problems' not in text


def test_compiled_operators_are_named():
    row = row_of(facts(operators=COMPILED), 'mmcv operators')
    assert row.state == doctor.OK and row.found == 'compiled (mmcv._ext; GCC 13.2, CUDA 12.8)'


def test_fallback_operators_tell_how_to_compile():
    row = row_of(facts(), 'mmcv operators')
    assert row.state == doctor.NOTE and 'pip COMPILE' in row.remedy


@pytest.mark.parametrize('package', ['mmengine', 'mmcv', 'mmdet', 'mmseg'])
@pytest.mark.parametrize('upstream', [False, True])
def test_missing_mm_package(package, upstream):
    distributions = {package: []}
    other = 'mmcv' if package != 'mmcv' else 'mmdet'
    if upstream:
        distributions[other] = [f"{doctor._UPSTREAM[other].replace('==', ' ')}"]
    broken = facts(
        importable={package: False}, distributions=distributions, **{package: missing(package)}
    )
    row = problems(broken)[package]
    assert row.found == 'not installed'
    name = doctor._UPSTREAM[package] if upstream else doctor._DISTRIBUTIONS[package][0]
    assert row.remedy.startswith('pip install') and name in row.remedy


def test_one_task_does_not_need_the_other_package():
    broken = facts(
        importable={'mmdet': False}, distributions={'mmdet': []}, mmdet=missing('mmdet')
    )
    assert 'mmdet' in problems(broken)
    assert 'mmdet' in problems(broken, ('detection',))
    assert problems(broken, ('segmentation',)) == {}


def test_broken_mmdet_import_shows_the_error_and_what_to_do():
    row = problems(facts(mmdet=failed("AttributeError: no attribute 'zz'")))['mmdet']
    assert "no attribute 'zz'" in row.found and 'onedl-mmdetection' in row.remedy


def test_torchvision_missing_or_for_another_torch():
    row = problems(
        facts(importable={'torchvision': False}, torchvision=missing('torchvision'))
    )['torchvision']
    assert row.found == 'not installed' and 'torchvision==0.26.*' in row.remedy
    wrong = facts(
        torch={'ok': True, 'version': '2.4.1+cu121', 'cuda': '12.1', 'hip': None},
        torchvision=failed('RuntimeError: operator torchvision::nms does not exist'),
    )
    assert 'torchvision==0.19.*' in problems(wrong)['torchvision'].remedy
    compiled = facts(
        importable={'torchvision': False}, torchvision=missing('torchvision'),
        operators=COMPILED,
    )
    assert problems(compiled) == {}


def test_old_triton_is_a_note_with_the_reason():
    reason = 'the installed Triton is 3.0.0; the kernels need 3.6'
    old = facts(
        triton={'ok': True, 'version': '3.0.0'},
        scan={'ok': True, 'backends': {'triton': [False, reason]}, 'chosen': {'cuda': 'torch'}},
    )
    assert problems(old) == {}
    assert row_of(old, "scan 'triton'").remedy == reason
    assert 'torch on cuda' in row_of(old, 'scan backend').found


@pytest.mark.parametrize('chosen, usable, state, found', [
    ({'cpu': 'cpp'}, False, doctor.OK, 'only a GPU'),
    ({'cpu': 'cpp', 'cuda': 'triton'}, False, doctor.OK, 'only a GPU'),
    ({'cpu': 'cpp', 'cuda': 'triton'}, True, doctor.OK, 'found; used when asked for'),
    ({'cpu': 'cpp', 'cuda': 'mamba_ssm'}, True, doctor.OK, 'found and used'),
    ({'cpu': 'cpp', 'cuda': 'torch'}, False, doctor.NOTE, 'not usable'),
])
def test_kernels_of_mamba_ssm(chosen, usable, state, found):
    reason = '' if usable else 'mamba_ssm is not installed'
    backends = {'mamba_ssm': [usable, reason], 'torch': [True, '']}
    some = facts(scan={'ok': True, 'backends': backends, 'chosen': chosen})
    row = row_of(some, "scan 'mamba_ssm'")
    assert row.state == state and found in row.found and problems(some) == {}
    assert row.remedy.startswith(reason) if state == doctor.NOTE else not row.remedy


def test_launches_that_are_left_to_triton():
    row = row_of(facts(scan=HEALTHY['scan'] | {'direct': False}), 'scan launches')
    assert row.state == doctor.NOTE and 'MMHYBRID_DIRECT_LAUNCH=0' in row.found
    unknown = {'direct': True, 'unknown': 'the installed Triton is 3.0.0'}
    row = row_of(facts(scan=HEALTHY['scan'] | unknown), 'scan launches')
    assert row.state == doctor.NOTE and 'ordinary path' in row.found and '3.0.0' in row.remedy
    rows = doctor.diagnose(facts(scan=HEALTHY['scan'] | {'direct': True}), doctor.TASKS)
    assert 'scan launches' not in [row.what for row in rows]


def test_no_triton_is_a_note():
    row = row_of(facts(importable={'triton': False}, triton=missing('triton')), 'triton')
    assert row.state == doctor.NOTE and row.found == 'not installed'


@pytest.mark.parametrize(
    ('probe', 'error', 'remedy'),
    [
        ('mmcv', 'ImportError: libGL.so.1: cannot open shared object file', 'opencv-python-headl'),
        ('mmdet', 'ImportError: numpy.core.multiarray failed to import', "'numpy<2'"),
        ('mmdet', 'ValueError: numpy.dtype size changed, may indicate', "'numpy<2'"),
        ('mmdet', 'AssertionError: MMCV==2.2.0 is used but incompatible. ', 'onedl-mmcv'),
        ('mmseg', "ModuleNotFoundError: No module named 'ftfy'", 'pip install ftfy'),
        ('mmengine', "ModuleNotFoundError: No module named 'pkg_resources'", "'setuptools<81'"),
        ('mmdet', "ModuleNotFoundError: No module named 'mmengine.runner'", 'onedl-mmengine'),
    ],
)
def test_well_known_import_errors(probe, error, remedy):
    assert remedy in problems(facts(**{probe: failed(error)}))[probe].remedy


def test_compiled_mmcv_for_another_torch():
    broken = facts(
        operators=failed('ImportError: mmcv/_ext.so: undefined symbol: _ZN2at'),
    )
    row = problems(broken)['mmcv operators']
    assert 'compile it again' in row.remedy and '--no-binary' in row.remedy


def test_two_owners_of_mmcv():
    both = facts(distributions={'mmcv': ['onedl-mmcv 2.3.6', 'mmcv-lite 2.1.0']})
    row = problems(both)['mmcv']
    assert row.remedy.startswith('pip uninstall -y onedl-mmcv mmcv-lite && pip install')


def test_mmengine_that_cannot_load_checkpoints():
    old = facts(
        distributions={'mmengine': ['mmengine 0.10.7']},
        checkpoints=failed('UnpicklingError: Weights only load failed. ...'),
    )
    assert 'pip install onedl-mmengine' in problems(old)['checkpoints'].remedy


@pytest.mark.parametrize(
    ('change', 'what'),
    [
        ({'python': [3, 9, 1]}, 'python'),
        ({'python': [3, 13, 0]}, 'python'),
        ({'torch': {'ok': True, 'version': '2.3.1', 'cuda': None, 'hip': None}}, 'torch'),
        ({'torch': failed('ModuleNotFoundError'), 'importable': {'torch': False}}, 'torch'),
        ({'gpu': failed('RuntimeError: CUDA error: no kernel image')}, 'GPU'),
        ({'scan': failed('AssertionError: not finite')}, 'scan'),
        ({'numpy': missing('numpy'), 'importable': {'numpy': False}}, 'numpy'),
        ({'pycocotools': failed('ImportError: x')}, 'pycocotools'),
        ({'mmhybrid': failed('ImportError: x')}, 'mmhybrid'),
        ({'step': failed('AssertionError: weights became NaN or Inf')}, 'training step'),
    ],
)
def test_everything_else_that_stops_training(change, what):
    assert what in problems(facts(**change))


def test_driver_without_a_visible_gpu_is_noted():
    row = row_of(facts(nvidia_driver=True), 'GPU')
    assert row.state == doctor.NOTE and 'CUDA_VISIBLE_DEVICES' in row.remedy


def test_patches_are_listed():
    row = row_of(facts(), 'patches')
    assert row.state == doctor.OK and row.found == (
        'mmcv-operators, pipelines (by importing mmhybrid); image-files (by its commands)')
    fewer = facts(patches={**HEALTHY['patches'], 'active': ['pipelines'], 'off': ['mmcv-operators'],
                           'hook': ['/s/mmhybrid_config_scheme.pth']})
    assert row_of(fewer, 'patches').found.startswith('pipelines (')
    left_out = row_of(fewer, 'patches left out')
    assert left_out.state == doctor.NOTE and left_out.found == 'mmcv-operators'
    assert 'MMHYBRID_WITHOUT' in left_out.remedy
    assert row_of(fewer, 'start-up hook').found == '/s/mmhybrid_config_scheme.pth'
    wrong = facts(mmhybrid=failed('ValueError: The environment variable MMHYBRID_WITHOUT=x'))
    assert problems(wrong)['mmhybrid'].remedy == 'correct or unset MMHYBRID_WITHOUT'


def test_exit_status_follows_the_table(monkeypatch, capsys):
    monkeypatch.setattr(doctor, 'collect_facts', facts)
    assert cli.main(['doctor']) == 0
    assert 'would work here' in capsys.readouterr().out
    broken = facts(mmseg=failed('ImportError: x'))
    monkeypatch.setattr(doctor, 'collect_facts', lambda: broken)
    assert cli.main(['doctor']) == 1
    assert 'would NOT work here' in capsys.readouterr().out
    assert cli.main(['doctor', '--only', 'detection']) == 0


# ---------------------------------------------------------------- child processes
def fake_package(folder, name, source):
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text(source)


def test_a_probe_that_kills_its_process_hides_only_what_follows(tmp_path, monkeypatch):
    fake_package(tmp_path, 'numpy', "__version__ = '9.9'\n")
    fake_package(tmp_path, 'cv2', 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n')
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.run_probes(True, ('numpy', 'opencv', 'mmcv'))
    assert found['numpy'] == {'ok': True, 'version': '9.9'}
    assert not found['opencv']['ok'] and 'killed by signal 11' in found['opencv']['error']
    assert not found['mmcv']['ok'] and 'not reached' in found['mmcv']['error']


def test_a_probe_that_hangs_is_ended(tmp_path, monkeypatch):
    fake_package(tmp_path, 'numpy', 'import time; time.sleep(60)\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, '_TIMEOUT', 2)
    found = doctor.run_probes(True, ('numpy',))
    assert 'nothing came back within 2 s' in found['numpy']['error']


def test_a_package_that_exits_or_prints_is_survived(tmp_path, monkeypatch):
    fake_package(tmp_path, 'numpy', "print('chatter'); raise SystemExit('no licence')\n")
    fake_package(tmp_path, 'cv2', "print('no newline', end=''); __version__ = '4.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.run_probes(True, ('numpy', 'opencv'))
    assert found['numpy']['error'] == 'SystemExit: no licence'
    assert found['opencv'] == {'ok': True, 'version': '4.0'}


def run_doctor(tmp_path=None, *arguments):
    path = [str(ROOT)] if tmp_path is None else [str(tmp_path), str(ROOT)]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(path)}
    return subprocess.run(
        [sys.executable, '-m', 'mmhybrid', 'doctor', *arguments],
        capture_output=True, text=True, env=environment, cwd=ROOT / 'tests', timeout=600,
    )


def test_here_and_now():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    result = run_doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'a small backbone learned on' in result.stdout
    assert result.stderr == ''


def test_it_runs_with_every_mm_package_broken(tmp_path):
    """mmengine raises when imported, mmcv and mmdet are hidden, torchvision does not fit."""
    fake_package(tmp_path, 'mmengine', "raise RuntimeError('half an upgrade')\n")
    fake_package(tmp_path, 'torchvision', "raise RuntimeError('operator does not exist')\n")
    block = """
        import importlib.abc, sys

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition('.')[0] in ('mmcv', 'mmdet'):
                    raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        sys.meta_path.insert(0, Block())
    """
    (tmp_path / 'sitecustomize.py').write_text(textwrap.dedent(block))
    result = run_doctor(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'half an upgrade' in result.stdout
    assert 'operator does not exist' in result.stdout
    assert 'would NOT work' in result.stdout
    assert 'scan backend' in result.stdout  # judged without mmengine
    assert 'Traceback' not in result.stdout + result.stderr
