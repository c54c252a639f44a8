"""The shell scripts: torchrun and slurm, several processes on a CPU."""
import csv
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.amp import has_accelerator

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(has_accelerator(), reason='runs on a CPU'),
    pytest.mark.skipif(os.name == 'nt', reason='the scripts are for a POSIX shell')]


def start(script, *arguments, **env):
    return subprocess.Popen(
        ['bash', str(ROOT / 'tools' / script), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS='1', **env))


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def checkpoint(it, path):
    """A file with fresh weights: what the metrics are does not matter, only that they agree."""
    cfg = Config.fromfile(it.config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def metrics(work_dir):
    file, = Path(work_dir).glob('*/*.json')
    found = json.loads(file.read_text().splitlines()[-1])
    return {key: value for key, value in found.items() if 'time' not in key}


def test_two_processes_measure_what_one_does(task, tmp_path):
    """Three images for two processes: the sampler repeats one, which must not count twice."""
    it = task('det')
    path = checkpoint(it, tmp_path / 'fresh.pth')
    arguments = ['--data-root', it.data, *it.options]
    two = start('dist_test.sh', it.config, path, 2, '--work-dir', tmp_path / 'two', *arguments)
    run_test([it.config, str(path), '--work-dir', str(tmp_path / 'one'), *arguments])
    output = finish(two)
    assert re.search(r'\|\s+box \|', output) and re.search(r'\| mask \|', output)
    assert metrics(tmp_path / 'two') == metrics(tmp_path / 'one')
    assert 'coco/segm_mAP' in metrics(tmp_path / 'one')
    assert not Path('.dist_test').exists()


@pytest.mark.slow
def test_two_processes_on_two_nodes(task, tmp_path):
    it = task('seg')
    path = checkpoint(it, tmp_path / 'fresh.pth')
    arguments = ['--data-root', it.data, *it.options]
    port = free_port()
    nodes = [start('dist_test.sh', it.config, path, 1, '--work-dir', tmp_path / 'two', *arguments,
                   NNODES='2', NODE_RANK=str(rank), MASTER_ADDR='127.0.0.1', PORT=port)
             for rank in range(2)]
    run_test([it.config, str(path), '--work-dir', str(tmp_path / 'one'), *arguments])
    output = finish(nodes[0])
    finish(nodes[1])
    assert 'mIoU' in output
    assert metrics(tmp_path / 'two') == metrics(tmp_path / 'one')


def test_train_and_resume(task, tmp_path):
    it = task('seg')
    arguments = [it.config, 2, '--data-root', it.data, '--work-dir', 'w', *it.options]
    output = finish(start('dist_train.sh', *arguments, 'train_cfg.max_iters=2'))
    assert 'connected through gloo' in output
    assert 'SyncBN' not in output.partition('Metrics')[0].rpartition('gloo')[2]
    output = finish(start('dist_train.sh', *[
        *arguments[:2], '--resume', *arguments[2:], 'train_cfg.max_iters=3']))
    assert 'resumed epoch: 0, iter: 2' in output
    assert torch.load('w/iter_3.pth', weights_only=False)['meta']['iter'] == 3
    with open('w/report/classes.csv', newline='') as file:
        counted = sum(float(row['pixels']) for row in csv.DictReader(file))
    labels = list(Path(it.data).glob('annotations/validation/*.png'))
    assert len(labels) == 3  # a sampler gives one of them to both
    assert counted == sum((np.asarray(Image.open(path)) > 0).sum() for path in labels)


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='threads are listed by Linux')
def test_threads_end_with_the_work(task, tmp_path, monkeypatch):
    """One of gloo's that is still at work while Python shuts down aborts the process."""
    it = task('seg')
    for name, value in dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                            MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, value)

    def threads():
        return len(list(Path('/proc/self/task').glob('*')))

    for tool, *arguments in ((run_train, it.config), (run_test, it.config, 'w/iter_1.pth')):
        at_work = []

        def main(argv, tool=tool, at_work=at_work):
            tool(argv)
            at_work.append(threads())
        assert run_command(main, [
            *arguments, '--launcher', 'pytorch', '--data-root', it.data, '--work-dir', 'w',
            *it.options, 'train_cfg.max_iters=1', 'val_dataloader.dataset.indices=1',
            'test_dataloader.dataset.indices=1']) == 0
        assert threads() <= at_work[0] - 3  # gloo has two that work and one that waits


def test_slurm(task, tmp_path):
    """A stand-in for srun starts the tasks with slurm's variables."""
    it = task('seg')
    path = checkpoint(it, tmp_path / 'fresh.pth')
    srun = tmp_path / 'bin' / 'srun'
    srun.parent.mkdir()
    srun.write_text("""#!/usr/bin/env bash
echo "srun $*"
for argument in "$@"; do case $argument in --ntasks=*) tasks=${argument#*=} ;; esac; done
while [ "$1" != "$PYTHON" ]; do shift; done
for ((rank = 0; rank < tasks; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=$tasks SLURM_NODELIST=localhost "$@" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
""")
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    output = finish(start(
        'slurm_test.sh', 'part', 'job', it.config, path, '--data-root', it.data, '--work-dir', 'w',
        *it.options, PATH=f'{srun.parent}{os.pathsep}{os.environ["PATH"]}', GPUS='2',
        GPUS_PER_NODE='0', CPUS_PER_TASK='1', MASTER_PORT=free_port()))
    assert '-p part --job-name=job --ntasks=2 --ntasks-per-node=2 --cpus-per-task=1' in output
    assert '2 processes on the CPU' in output and 'mIoU' in output


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'dist_search.sh',
                                    'slurm_train.sh', 'slurm_test.sh', 'slurm_search.sh'])
def test_usage(script):
    assert f'usage: bash tools/{script}' in finish(start(script, 'only_one'), code=2)


def test_error_in_all_processes_is_told_once(tmp_path):
    output = finish(start('dist_train.sh', tmp_path / 'gone.py', 2), code=1)
    assert output.count('There is no config') == 1 and 'Traceback' not in output
    assert 'Process 0 ended with code 1' in output


WAITING = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: sys.exit(128 + number))
print('ready', flush=True)
if sys.argv[1:]:
    sys.exit(138)
signal.pause()
"""


def test_signals_and_exit_codes_pass_through(tmp_path):
    """To the script alone, as `kill` and a batch script send them; or to a process of training."""
    (tmp_path / 'tool.py').write_text(WAITING)
    tool = os.path.relpath(tmp_path / 'tool.py', ROOT / 'tools')
    cases = [('', signal.SIGTERM, 143, 'Stopped by SIGTERM'),
             ('', signal.SIGUSR1, 138, 'Stopped by SIGUSR1'),
             ('end', None, 138, 'Process 0 ended with code 138')]
    runs = [subprocess.Popen(
        ['bash', '-c', f'source {ROOT}/tools/dist_launch.sh; launch 1 {tool} {end}'], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(os.environ, PYTHON=sys.executable)) for end, *_ in cases]
    for run, (_, number, code, said) in zip(runs, cases, strict=True):
        while run.stdout.readline() != 'ready\n':
            assert run.poll() is None
        if number:
            run.send_signal(number)
        output = run.stdout.read()
        assert run.wait(60) == code and said in output and 'Traceback' not in output
