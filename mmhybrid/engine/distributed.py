"""Several processes, on GPUs or on a CPU.

On a CPU mmengine cannot do it alone: it calls ``torch.cuda.set_device`` before it makes the
process group, passes ``device_ids`` to DistributedDataParallel, and SyncBN raises on CPU tensors.
"""
from __future__ import annotations

import datetime
import gc
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import torch
import torch.distributed as dist

from ..errors import UserError
from .amp import has_accelerator

__all__ = ['end_if_alone', 'launched_rank', 'leave_process_group', 'prepare_launch',
           'replace_sync_bn']

ALONE = 75  # exit code, see end_if_alone
# Parts of errors of connections, gloo's and NCCL's.
BROKEN = ('gloo/transport', 'Connection closed by peer', 'Connection reset by peer',
          'remote process exited', 'NCCL error', 'NCCL communicator')
SYNC_BN = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm', 'NaiveSyncBatchNorm')


def prepare_launch(cfg, launcher: str) -> list[str]:
    """Make the config and the process ready for ``launcher``; returns what to log.

    Args:
        cfg: the config, changed in place.
        launcher: "none", "pytorch" (torchrun), "slurm" or "mpi".

    Raises:
        UserError: if the launcher's environment is missing, or a process has no GPU of its own.
    """
    cfg.launcher = launcher
    notes = []
    if launcher != 'none':
        _read_launcher(launcher)
    elif _whole_number('WORLD_SIZE', 1, default=1) > 1:
        raise UserError(f'{os.environ["WORLD_SIZE"]} processes were started, but each would work '
                        'alone. Add --launcher pytorch, or use tools/dist_train.sh.')
    if has_accelerator():
        if launcher != 'none' and torch.cuda.is_available():
            local_rank, gpus = _whole_number('LOCAL_RANK', 0), torch.cuda.device_count()
            if local_rank >= gpus:
                raise UserError(f'This machine has {gpus} GPU(s), but process {local_rank + 1} '
                                'was started on it. Start one process per GPU.')
        return notes
    replaced = replace_sync_bn(cfg)
    if replaced:
        notes.append(f'SyncBN needs a GPU: {replaced} setting(s) changed to BN. The names in '
                     'checkpoints stay the same.')
    if launcher == 'none':
        return notes
    env = cfg.setdefault('env_cfg', {})
    dist_cfg = env.setdefault('dist_cfg', {})
    dist_cfg['backend'] = 'gloo'
    if not dist.is_initialized():
        dist.init_process_group(
            'gloo', timeout=datetime.timedelta(seconds=dist_cfg.get('timeout', 1800)))
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel', broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper
    notes.append(f'{dist.get_world_size()} processes on the CPU, connected through gloo.')
    return notes


def launched_rank() -> int:
    """Number of this process among those that a launcher started, before they are connected."""
    number = os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))
    return int(number) if number.isdecimal() else 0  # else prepare_launch says so


def end_if_alone(error: BaseException) -> None:
    """End this process quietly if an error says that the connection to another one broke.

    That one, and its launcher, say why; here it would be a traceback of each of many processes.
    tools/dist_launch.py knows the exit code and names the process that was lost.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if not isinstance(error, RuntimeError) or not any(mark in str(error) for mark in BROKEN):
        return
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        print(f'\nERROR (process {dist.get_rank()}): the connection to another process broke, '
              'because that one ended or cannot be reached; what it said is in its own output.\n',
              file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ALONE)  # gloo's threads still wait for the other one, and would for long


def leave_process_group() -> None:
    """Leave the process group, if there is one. Nothing may hold a runner or model any more.

    gloo's threads drop the tensors of a transfer when they get round to it. One that does so while
    Python shuts down aborts the process, after all work was done, so they have to end before. They
    end with the last reference to the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    first = dist.get_rank() == 0
    group = dist.group.WORLD
    gc.collect()  # DistributedDataParallel holds the group, in a cycle with the runner
    dist.destroy_process_group()
    del group  # the last reference is Python's: only that one lets go of the GIL to join threads
    if first:
        with suppress(OSError):  # absent, or in use by another run
            os.rmdir('.dist_test')  # where mmengine's evaluators met


def replace_sync_bn(cfg) -> int:
    """Write BN wherever the model's config says SyncBN; returns how many places."""
    cfg.pop('sync_bn', None)
    count, stack = 0, [cfg.get('model')]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.get('type') in SYNC_BN:
                node['type'] = 'BN'
                count += 1
            stack.extend(node.values())
        elif isinstance(node, (list, tuple)):
            stack.extend(node)
    return count


def _read_launcher(launcher: str) -> None:
    """Bring the variables of slurm and mpi into the form of torchrun."""
    env = os.environ
    if launcher == 'pytorch':
        _need(launcher, 'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    elif launcher == 'slurm':
        _need(launcher, 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST')
        env['RANK'], env['WORLD_SIZE'] = env['SLURM_PROCID'], env['SLURM_NTASKS']
        env['LOCAL_RANK'] = env.get('SLURM_LOCALID') or str(
            _whole_number('RANK', 0) % max(torch.cuda.device_count(), 1))
        if 'MASTER_ADDR' not in env:
            env['MASTER_ADDR'] = _first_host(env['SLURM_NODELIST'])
    elif launcher == 'mpi':
        _need(launcher, 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE',
              'OMPI_COMM_WORLD_LOCAL_RANK', 'MASTER_ADDR')
        env['RANK'], env['WORLD_SIZE'] = env['OMPI_COMM_WORLD_RANK'], env['OMPI_COMM_WORLD_SIZE']
        env['LOCAL_RANK'] = env['OMPI_COMM_WORLD_LOCAL_RANK']
    else:
        raise UserError(f'Unknown launcher {launcher!r}: use none, pytorch, slurm or mpi.')
    env.setdefault('MASTER_PORT', '29500')
    env.setdefault('LOCAL_RANK', '0')
    rank, size = _whole_number('RANK', 0), _whole_number('WORLD_SIZE', 1)
    if rank >= size:  # the others would wait for a process that there is not
        raise UserError(f'The environment variable RANK is {rank}, but there are {size} processes '
                        '(WORLD_SIZE), which are numbered from 0.')
    _whole_number('LOCAL_RANK', 0)
    _whole_number('MASTER_PORT', 1)


def _whole_number(name: str, low: int, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        if int(value) >= low:
            return int(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f'The environment variable {name} is {value!r}; expected a whole number of at '
                    f'least {low}.')


def _need(launcher: str, *names: str) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        way = {'pytorch': 'torchrun, or bash tools/dist_train.sh CONFIG PROCESSES',
               'slurm': 'srun, or bash tools/slurm_train.sh', 'mpi': 'mpirun'}[launcher]
        raise UserError(f'--launcher {launcher} needs the environment variable(s) '
                        f'{", ".join(missing)}. Start the processes with {way}.')


def _first_host(nodes: str) -> str:
    if not any(mark in nodes for mark in ',['):
        return nodes
    if shutil.which('scontrol') is None:
        raise UserError(f'Cannot tell the first of the nodes {nodes!r}, because scontrol is not '
                        'on PATH. Set MASTER_ADDR to its name.')
    shown = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True,
                           text=True, check=True)
    return shown.stdout.split()[0]
