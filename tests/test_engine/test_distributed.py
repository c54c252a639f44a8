"""Several processes on a CPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from mmengine.config import Config

from mmhybrid.engine.amp import has_accelerator
from mmhybrid.engine.config import apply_resume
from mmhybrid.engine.distributed import end_if_alone, prepare_launch, replace_sync_bn
from mmhybrid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(has_accelerator(), reason='what happens without an accelerator')


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_sync_bn_everywhere():
    cfg = Config(dict(sync_bn='torch', model=dict(
        a=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
        b=[dict(norm_cfg=dict(type='MMSyncBN')), dict(norm_cfg=dict(type='GN'))])))
    assert replace_sync_bn(cfg) == 2
    assert cfg.model.a.norm_cfg == dict(type='BN', requires_grad=True)
    assert [each.norm_cfg.type for each in cfg.model.b] == ['BN', 'GN']
    assert 'sync_bn' not in cfg


@on_cpu
def test_one_process_on_a_cpu():
    cfg = Config(dict(model=dict(norm_cfg=dict(type='SyncBN'))))
    note, = prepare_launch(cfg, 'none')
    assert 'SyncBN' in note and cfg.model.norm_cfg.type == 'BN' and cfg.launcher == 'none'
    assert prepare_launch(cfg, 'none') == []


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--launcher pytorch'):
        prepare_launch(Config(dict()), 'none')


@pytest.mark.parametrize('launcher, name', [
    ('pytorch', 'dist_train.sh'), ('slurm', 'srun'), ('mpi', 'mpirun')])
def test_launcher_without_its_environment(launcher, name, monkeypatch):
    for key in list(os.environ):
        if key.startswith(('SLURM_', 'OMPI_')):
            monkeypatch.delenv(key)
    with pytest.raises(UserError, match=name):
        prepare_launch(Config(dict()), launcher)


def test_slurm_node_list_without_scontrol(monkeypatch):
    monkeypatch.setenv('PATH', '')
    for name, value in dict(PROCID='0', NTASKS='2', NODELIST='node[1-2]').items():
        monkeypatch.setenv(f'SLURM_{name}', value)
    monkeypatch.setenv('RANK', 'overwritten')
    with pytest.raises(UserError, match='Set MASTER_ADDR'):
        prepare_launch(Config(dict()), 'slurm')


WORKER = """
import sys, torch, toy
from pathlib import Path
from mmengine.config import Config
from mmhybrid.engine.distributed import leave_process_group, prepare_launch
cfg = Config(dict())
prepare_launch(cfg, 'pytorch')
assert torch.distributed.get_backend() == 'gloo' and cfg.model_wrapper_cfg.device_ids is None
folder, by_epoch = sys.argv[1], sys.argv[2] == 'epoch'
train = (dict(by_epoch=True, max_epochs=3, val_interval=1) if by_epoch else
         dict(by_epoch=False, max_iters=8, val_interval=3))
ckpt = dict(interval=1) if by_epoch else dict(interval=4, by_epoch=False)
sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
file = 'epoch_1.pth' if by_epoch else 'iter_4.pth'
# Gradients that wait for a step differ between processes: iter_4.pth holds those of one iteration.
optim = None if by_epoch else dict(accumulative_counts=3)
common = dict(sampler=sampler, launcher='pytorch', wrapper=cfg.model_wrapper_cfg, optim=optim)
whole = toy.run(folder + '/a', train, ckpt, **common)
resumed = toy.run(folder + '/b', train, ckpt, resume=f'{folder}/a/{file}', **common)
other = toy.run(folder + '/c', train, ckpt, resume=f'{folder}/a/{file}', hook=False, **common)
# Running statistics of BatchNorm differ between processes, and rank 0's are what is saved.
drop = lambda names: [name for name in names if 'running' not in name]
assert drop(toy.difference(whole, resumed)) == [], toy.difference(whole, resumed)
assert drop(toy.difference(whole, other))
print('bitwise')
threads = lambda: len(list(Path('/proc/self/task').glob('*')))
before = threads()
del whole, resumed, other
leave_process_group()
# gloo has two threads that work and one that waits; where there is no such folder, 0 <= 0
assert threads() <= max(before - 3, 0), (before, threads())
"""


@on_cpu
@pytest.mark.parametrize('loop', ['epoch', 'iterations'])
def test_two_processes_resume_bitwise(tmp_path, loop):
    script = tmp_path / 'worker.py'
    script.write_text(WORKER)
    env = dict(os.environ, OMP_NUM_THREADS='1',
               PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(toy.__file__).parent)]))
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(script), str(tmp_path), loop],
        capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('bitwise') == 2
    states = torch.load(next((tmp_path / 'a').glob('*_[14].pth')), weights_only=False)
    first, second = states['random_state']['ranks']
    assert not torch.equal(first['torch'], second['torch'])
    if loop == 'iterations':
        first, second = states['pending_gradients']['ranks']
        assert not torch.equal(first['net.0.weight'], second['net.0.weight'])


def test_a_restart_goes_on_from_what_this_job_has_written(tmp_path, monkeypatch):
    def resumed(count, start=None, resume=None):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', count)
        if start is not None:
            monkeypatch.setenv('MMHYBRID_JOB_START', str(start))
        cfg = Config(dict(work_dir=str(tmp_path)))
        apply_resume(cfg, resume)
        return cfg.get('load_from')

    path = tmp_path / 'epoch_1.pth'
    assert resumed('1', 0) is None  # lost before the first checkpoint
    torch.save(dict(state_dict={}, meta=dict(iter=3)), path)
    written = path.stat().st_mtime
    assert resumed('0', written - 1) is None
    assert resumed('1', written - 1) == str(path)
    assert resumed('1', written - 1, 'other.pth') == str(path)
    assert resumed('1', written + 1) is None  # of an earlier job
    assert resumed('1', written + 1, 'other.pth') == 'other.pth'


def test_errors_of_connections(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 2)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 1)
    monkeypatch.setattr(os, '_exit', ended.append)
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    end_if_alone(ValueError('Connection closed by peer'))
    end_if_alone(RuntimeError('shapes differ'))
    assert ended == []
    end_if_alone(RuntimeError('[/x/gloo/transport/tcp/pair.cc:538] Read error'))
    assert ended == [75] and capfd.readouterr().err.count('process 1') == 1
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')  # its launcher says it
    end_if_alone(RuntimeError('Connection closed by peer [127.0.0.1]:1'))
    assert ended == [75, 75] and capfd.readouterr().err == ''
