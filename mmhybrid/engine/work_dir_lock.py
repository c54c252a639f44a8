"""One training at a time in a work directory."""
from __future__ import annotations

import json
import logging
import os
import os.path as osp
import threading
import time
import uuid
from contextlib import suppress

from mmengine.logging import print_log

from mmhybrid import processes
from mmhybrid.compat.whole_checkpoints import write_aside

from ..errors import UserError

__all__ = ['LOCK', 'WorkDirLock']

LOCK = '.mmhybrid-training.lock'
BEAT = 30  # seconds between two signs of life
SILENCE = 180  # seconds without one after which a process that cannot be looked at is dead


class WorkDirLock:
    """The claim of a training on its work directory, a file that rank 0 holds.

    On the same machine the number and the start of the process decide whether its holder lives. On
    another one it is dead after three minutes without a sign of life: the time of the file, which
    is set every 30 seconds and compared with that of a new file, so that clocks may differ. A
    restart by the same torchrun or Slurm job need not wait, and the lock in a copy of the folder is
    nobody's.

    Args:
        work_dir: an existing folder by the time of :meth:`acquire`.
        rank: of this process; others than 0 hold nothing.
    """

    def __init__(self, work_dir: str, rank: int = 0):
        self.path = osp.join(work_dir, LOCK)
        self._work_dir, self._rank = work_dir, rank
        self._own: dict | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='mmhybrid-lock', daemon=True)

    def acquire(self) -> list[str]:
        """Take the lock; returns what to say in the log.

        Raises:
            UserError: while another training lives, or if the folder cannot be written.
        """
        if self._rank:
            return []
        notes = []
        try:
            own = _this_run(self._work_dir)
            for _ in range(3):
                if self._create(own):
                    self._own = own
                    self._thread.start()
                    return notes
                notes += self._remove_dead(own)
        except OSError as error:
            raise UserError(f'The work directory {self._work_dir} cannot be written: '
                            f'{error.strerror} ({error.filename or self.path}). Give another one '
                            'with --work-dir.') from error
        raise UserError(f'Several trainings start in {self._work_dir} at this moment. Give each a '
                        '--work-dir of its own.')

    def release(self) -> None:
        """Give the lock back, if this process holds it."""
        own, self._own = self._own, None
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        if own is not None and own['pid'] == os.getpid() and _read(self.path) == own:
            with suppress(OSError):
                os.remove(self.path)

    close = release

    def _create(self, own: dict) -> bool:
        """Make the file with its content in one step, unless it exists."""
        part = f'{self.path}.{own["token"]}'
        write_aside(part, json.dumps(own).encode())
        try:
            os.link(part, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with open(self.path, 'x', encoding='utf-8') as file:
                    json.dump(own, file)
            except FileExistsError:
                return False
        finally:
            os.remove(part)
        return True

    def _remove_dead(self, own: dict) -> list[str]:
        """Take the file away if its holder is dead.

        Raises:
            UserError: if it is alive, or may be.
        """
        held = _read(self.path)
        if not osp.lexists(self.path):
            return []  # given back meanwhile
        if osp.isdir(self.path):
            raise UserError(f'{self.path} is a folder where the lock of a training should be. '
                            'Remove it.')
        age = self._age(own)
        alive = _alive(held, own, age)
        if alive:
            raise UserError(self._refusal(held, age, alive))
        # Another process may come to the same conclusion now; what it puts here must stay.
        aside = f'{self.path}.{own["token"]}.old'
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return []
        if _read(aside) != held:
            with suppress(OSError):
                os.link(aside, self.path)
            os.remove(aside)
            return []
        os.remove(aside)
        return [self._taken_over(held, own, age)]

    def _age(self, own: dict) -> float:
        """Seconds since the last sign of life, by the clock that dates the files here."""
        probe = f'{self.path}.{own["token"]}.now'
        with open(probe, 'x') as file:
            file.write(' ')
        try:
            return os.stat(probe).st_mtime - os.stat(self.path).st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            os.remove(probe)

    def _refusal(self, held: dict | None, age: float, why: str) -> str:
        if held is None:
            who = (f'The lock of another training in {self._work_dir} cannot be read, and it was '
                   f'written {age:.0f} seconds ago')
        else:
            who = (f'Another training works in {self._work_dir}: process {held["pid"]} on '
                   f'{held["host"]}, since {held["since"]} ({why})')
        return (f"{who}. Two would overwrite each other's checkpoints. Give this one another "
                f'--work-dir, or remove {self.path} if you are sure that the other has ended.')

    def _taken_over(self, held: dict | None, own: dict, age: float) -> str:
        if held is None:
            return (f'The lock of a training in {self._work_dir} was damaged and {age:.0f} seconds '
                    'old; it was taken over.')
        if _copied(held, own):
            return (f'The lock in {self._work_dir} came with a copy of {held["folder"][0]}; it was '
                    'replaced.')
        return (f'Process {held["pid"]} on {held["host"]}, which worked in {self._work_dir} since '
                f'{held["since"]}, has ended without giving its lock back; it was taken over.')

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            if not self.beat():
                return

    def beat(self) -> bool:
        """Give a sign of life; False once the lock is somebody else's."""
        held, own = _read(self.path), self._own
        if own is None:
            return False
        if held is not None and held != own:
            print_log(f'Another training took over {self._work_dir} (process {held["pid"]} on '
                      f'{held["host"]}), because this one gave no sign of life for {SILENCE} '
                      'seconds. Stop one of them.', logger='current', level=logging.ERROR)
            return False
        with suppress(OSError):  # the next one may succeed
            if held == own:
                os.utime(self.path)
            else:  # removed or damaged by somebody
                write_aside(self.path, json.dumps(own).encode())
        return True


def _this_run(work_dir: str) -> dict:
    job = None
    for name in ('TORCHELASTIC_RUN_ID', 'SLURM_JOB_ID'):
        value = os.environ.get(name)
        if job is None and value and value.lower() != 'none':  # torchrun's word
            job = f'{name}={value}'
    pid = os.getpid()
    return dict(host=processes.host(), namespace=processes.namespace(), pid=pid,
                start=processes.started(pid), job=job, token=uuid.uuid4().hex,
                since=time.strftime('%Y-%m-%d %H:%M:%S %z'),
                folder=[osp.realpath(work_dir), os.stat(work_dir).st_ino])


def _read(path: str) -> dict | None:
    """Holder of a lock; None for a file that no training wrote whole."""
    try:
        with open(path, 'rb') as file:
            held = json.loads(file.read(10_000))
    except (OSError, ValueError, RecursionError):
        return None
    texts = ('host', 'namespace', 'token', 'since')
    if (not isinstance(held, dict) or type(held.get('pid')) is not int or held['pid'] < 1
            or any(not isinstance(held.get(key), str) for key in texts)
            or not isinstance(held.get('start'), (str, type(None)))):
        return None
    return held


def _copied(held: dict, own: dict) -> bool:
    """Whether the lock was made in another folder.

    One folder may have several paths (mounts, containers), and on some network drives a number that
    changes; a copy differs in both.
    """
    folder = held.get('folder')
    return (isinstance(folder, list) and len(folder) == 2
            and all(mine != theirs for mine, theirs in zip(own['folder'], folder, strict=True)))


def _alive(held: dict | None, own: dict, age: float) -> str:
    """Why the holder must be taken for alive; empty if it is dead or this is its restart."""
    if held is not None:
        if _copied(held, own):
            return ''
        if (held['host'], held['namespace']) == (own['host'], own['namespace']):
            lives = processes.lives(held['pid'], held['start'])
            if lives is not None:
                return 'it runs on this machine' if lives else ''
        if held.get('job') and held['job'] == own['job']:
            return ''
    return f'its last sign of life is {max(age, 0):.0f} seconds old' if age < SILENCE else ''
