"""A process that is lost ends its job on all machines, or lets it start again."""
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs
import torch
import torch.distributed.fsdp

from mmhybrid.engine.amp import has_accelerator
from mmhybrid.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(has_accelerator(), reason='runs on a CPU'),
    pytest.mark.skipif(os.name == 'nt', reason='the scripts are for a POSIX shell')]

LOSING = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class LoseProcess(Hook):
    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        first = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
        if runner.rank == int(os.environ.get('LOSE', -1)) and runner.iter == 4 and first:
            os.kill(os.getpid(), signal.SIGKILL)
"""
EXTRA = """
custom_imports = dict(imports=['small_runs', 'losing'])
custom_hooks = [dict(type='LoseProcess')]
"""


@pytest.fixture
def train(tmp_path):
    """Start a machine of a training; returns the process."""
    (tmp_path / 'losing.py').write_text(LOSING)
    config = small_runs.write(tmp_path, EXTRA)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, Path(small_runs.__file__).parent)))
    common = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS='1', PYTHONPATH=path)

    def start(processes, work_dir, *options, **env):
        return subprocess.Popen(
            ['bash', str(ROOT / 'tools/dist_train.sh'), config, str(processes), '--work-dir',
             str(tmp_path / work_dir), *options], text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(common, **env))
    return start


def finish(process, code):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output[-3000:]
    assert 'Traceback' not in output, output[-3000:]
    return output


def nodes(train, *options, **env):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    return [train(1, 'two', *options, NNODES='2', NODE_RANK=str(rank), PORT=port, **env)
            for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_one_line_on_each_machine_names_the_lost_process(train, lost):
    began = time.monotonic()
    machines = nodes(train, LOSE=str(lost))
    said = [finish(machine, 1) for machine in machines]
    assert time.monotonic() - began < 120
    for rank, output in enumerate(said):
        line = f'Process {lost} was killed by SIGKILL' + (
            '; what it said is above.' if rank == lost else
            ' on another machine, so all others end.')
        assert output.count(line) == 1 and output.count(f'Process {lost}') == 1, output


@pytest.mark.slow
def test_a_lost_process_of_one_machine(train):
    output = finish(train(2, 'one', LOSE='1'), 1)
    assert output.count('Process 1 was killed by SIGKILL; what it said is above.') == 1


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    (), pytest.param(('--fsdp', 'sharded'), marks=pytest.mark.skipif(
        not hasattr(torch.distributed.fsdp, 'FSDPModule'), reason='an older PyTorch'))])
def test_a_restarted_training_equals_one_without_a_break(train, tmp_path, options):
    finish(train(2, 'whole', *options), 0)
    output = finish(train(2, 'lost', *options, LOSE='0', MAX_RESTARTS='1'), 0)
    assert 'Start 2 of this job: it goes on from ' in output
    whole, lost = (read_checkpoint(tmp_path / name / 'epoch_3.pth') for name in ('whole', 'lost'))
    for name, tensor in whole['state_dict'].items():
        if 'running' not in name:
            assert torch.equal(tensor, lost['state_dict'][name]), name


@pytest.mark.slow
def test_two_machines_start_again(train, tmp_path):
    for machine in nodes(train, LOSE='1', MAX_RESTARTS='3'):
        finish(machine, 0)
    assert (tmp_path / 'two' / 'epoch_3.pth').is_file()
