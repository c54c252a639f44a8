"""Checkpoints are written whole.

mmengine removes the oldest checkpoint, then writes the new one in place, then names it in
``last_checkpoint``; a run that is killed meanwhile, or finds the disk full, leaves less than it
had. With this patch every ``CheckpointHook`` writes aside and renames, and what has to go, goes
last.
"""
from __future__ import annotations

import errno
import functools
import io
import itertools
import os
import os.path as osp
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mmengine.runner
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.hooks import checkpoint_hook as mmengine_hook
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import runner as mmengine_runner

from mmhybrid import processes

__all__ = ['install', 'is_installed', 'remove_left_overs', 'write_aside']

PART = re.compile(r'\.checkpoint-(?P<host>.+)-(?P<pid>\d+)-(?P<start>[^-]*)-\d+\.part')
ELSEWHERE = 86400  # seconds after which a part that another machine left is taken for dead
_count = itertools.count()

def write_aside(path: str | os.PathLike, content: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile.

    Raises:
        OSError: with ``path`` as its file; what was there before is untouched.
    """
    target = osp.realpath(path)  # through a link, as writing in place does
    folder = osp.dirname(target)
    os.makedirs(folder, exist_ok=True)
    pid = os.getpid()
    part = osp.join(folder, f'.checkpoint-{processes.host()}-{pid}-'
                            f'{processes.started(pid) or ""}-{next(_count)}.part')
    try:
        with open(part, 'xb') as file:
            file.write(content)
            file.flush()
            _to_disk(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        with suppress(OSError):
            os.remove(part)  # absent after success
    with suppress(OSError):  # the name too; not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _to_disk(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise  # a full disk behind a network is often noticed here


def remove_left_overs(folder: str) -> list[str]:
    """Remove what killed processes did not finish in ``folder``; returns the names."""
    removed = []
    for name in os.listdir(folder) if osp.isdir(folder) else []:
        found, path = PART.fullmatch(name), osp.join(folder, name)
        if found is None:
            continue
        with suppress(OSError):
            if found['host'] == processes.host():
                dead = processes.lives(int(found['pid']), found['start'] or None) is False
            else:
                dead = time.time() - os.stat(path).st_mtime > ELSEWHERE
            if dead:
                os.remove(path)
                removed.append(name)
    return removed


def _save_checkpoint(checkpoint, filename, file_client_args=None, backend_args=None) -> None:
    """As mmengine's function of this name; a file of this machine is written aside."""
    if file_client_args is None and '://' not in str(filename) and isinstance(
            get_file_backend(filename, backend_args=backend_args and dict(backend_args)),
            LocalBackend):
        buffer = io.BytesIO()  # not in a with statement: an error may still hold what it wrote
        torch.save(checkpoint, buffer)
        write_aside(filename, buffer.getbuffer())
    else:
        _mmengines_save(checkpoint, filename, file_client_args, backend_args)


class _RecordAside(io.StringIO):
    """A text file that is written aside when it is closed without an error."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    def __exit__(self, kind, error, trace):
        if kind is None:
            write_aside(self._path, self.getvalue().encode())
        super().__exit__(kind, error, trace)


def _open(file, mode='r', *args, **kwargs):
    return _RecordAside(file) if mode == 'w' else open(file, mode, *args, **kwargs)


class _Removals:
    """A file backend that notes what to remove, and does it when it is told to."""

    def __init__(self, backend):
        self._backend, self._later = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def remove(self, path) -> None:
        self._later.append((self._backend.remove, path))

    def rmtree(self, path) -> None:
        self._later.append((self._backend.rmtree, path))

    def carry_out(self, keep: set) -> None:
        for remove, path in self._later:
            if path not in keep:
                remove(path)


@contextmanager
def _removing_last(hook: CheckpointHook) -> Iterator[None]:
    """Within, ``hook`` removes nothing; afterwards it does, unless there was an error."""
    backend = hook.file_backend
    hook.file_backend = removals = _Removals(backend)
    try:
        yield
    finally:
        hook.file_backend = backend
    # The best checkpoint may have been written again under its name.
    removals.carry_out({hook.last_ckpt, getattr(hook, 'best_ckpt_path', None),
                        *getattr(hook, 'best_ckpt_path_dict', {}).values()})


def _wrapped(method):
    @functools.wraps(method)
    def call(hook, *args, **kwargs):
        with _removing_last(hook):
            return method(hook, *args, **kwargs)
    call.whole = True
    return call


def _cleaning(method):
    @functools.wraps(method)
    def before_train(hook, runner):
        method(hook, runner)
        if is_main_process():
            folders = {runner.work_dir, hook.out_dir}
            names = [name for folder in folders for name in remove_left_overs(folder)]
            if names:
                print_log(f'Removed {len(names)} unfinished file(s) of a run that was killed while '
                          f'it wrote a checkpoint: {", ".join(names)}', logger='current')
    return before_train


_mmengines_save = mmengine_checkpoint.save_checkpoint


def install() -> None:
    """Let mmengine write whole checkpoints; doing it twice changes nothing."""
    if is_installed():
        return
    for module in (mmengine.runner, mmengine_checkpoint, mmengine_runner):
        module.save_checkpoint = _save_checkpoint
    CheckpointHook._save_checkpoint_with_step = _wrapped(CheckpointHook._save_checkpoint_with_step)
    CheckpointHook._save_best_checkpoint = _wrapped(CheckpointHook._save_best_checkpoint)
    CheckpointHook.before_train = _cleaning(CheckpointHook.before_train)
    mmengine_hook.open = _open  # its only use there is to write last_checkpoint


def is_installed() -> bool:
    """Whether mmengine writes whole checkpoints."""
    return getattr(CheckpointHook._save_checkpoint_with_step, 'whole', False)
