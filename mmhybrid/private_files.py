"""Files in folders that other users may reach: whose they are, and one process at a time.

A folder for compiled code or downloads may be shared or lie in one that everybody writes to. What
is opened here is never opened through a link, and is asked whose it is after it was opened.
"""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
    import grp
    import pwd
except ImportError:  # Windows: no owners and modes in this sense, and no such locks
    fcntl = grp = pwd = None

__all__ = ['alone', 'exposure', 'exposure_of', 'open_new', 'open_own', 'open_regular']

_ROOT = 0
_PATIENCE = 600.  # seconds that a holder of a lock may go on without visible progress
_log = logging.getLogger(__name__)


# Who may write -----------------------------------------------------------------------------------


def exposure(folder: Path) -> str | None:
    """Say how others could change what a folder holds, and the remedy; None when they cannot.

    The folder must belong to this user or root, and only they may write to it.  In folders above
    it others may write where the sticky bit keeps them from renaming what is not theirs.
    """
    if pwd is None:
        return None
    folder = Path(os.path.realpath(folder))
    found = exposure_of(os.stat(folder), folder)
    for parent in folder.parents:
        info = os.stat(parent)
        if found is None and not info.st_mode & stat.S_ISVTX:
            found = _open_to(info, parent)
    return found


def exposure_of(info: os.stat_result, path: Path) -> str | None:
    """As :func:`exposure`, for one file or folder of which the status is known."""
    if pwd is None:
        return None
    if info.st_uid not in (os.geteuid(), _ROOT):
        return (f'{path} belongs to {_user(info.st_uid)} and not to {_user(os.geteuid())}; '
                'remove it or change its owner with chown')
    return _open_to(info, path)


def _open_to(info: os.stat_result, path: Path) -> str | None:
    everybody = info.st_mode & stat.S_IWOTH
    if not everybody and (not info.st_mode & stat.S_IWGRP or _only_mine(info.st_gid)):
        return None
    who = 'everybody' if everybody else f'the group {_group(info.st_gid)}'
    mode = f'{stat.S_IMODE(info.st_mode):o}'
    return f'{who} may write to {path} (mode {mode}); run: chmod go-w {path}'


def _only_mine(gid: int) -> bool:
    """Whether a group is root's, or the one that many systems make for every single user."""
    if gid == _ROOT:
        return True
    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (gid, group.gr_name) == (me.pw_gid, me.pw_name) and {*group.gr_mem} <= {me.pw_name}


def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f'the user with the number {uid}'


def _group(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return f'with the number {gid}'


# Opening -----------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike, flags: int) -> int:
    """Open a file as ``os.open`` does, but no link, pipe or device.

    Raises:
        OSError: as ``os.open``; ``strerror`` says so if it is something else than a file.
    """
    flags |= getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)  # a pipe would wait
    flags |= getattr(os, 'O_BINARY', 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP or os.path.islink(path):
            raise OSError(errno.ELOOP, 'it is a link, which is not followed', path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, 'it is not a regular file', path)
    return handle


def open_own(path: str | os.PathLike, flags: int) -> int:
    """Open an existing file that this user made and that has no second name."""
    handle = open_regular(path, flags)
    info = os.fstat(handle)
    if pwd is not None and (info.st_uid != os.geteuid() or info.st_nlink != 1):
        os.close(handle)
        raise PermissionError(errno.EPERM, 'it belongs to another user or has a second name', path)
    return handle


def open_new(path: Path) -> int:
    """Make a file for writing in the place of whatever has its name; what a link names stays."""
    path.unlink(missing_ok=True)
    return open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


# One at a time -----------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(path: Path, progress: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock file; the system releases the lock of a process that dies.

    Args:
        path: the file, empty, and left there: another process may wait for it.
        progress: gives something that changes while the holder gets on with its work.

    Raises:
        TimeoutError: if another process holds it and nothing changes.
        OSError: if the file cannot be made or locked.
    """
    if fcntl is None:
        yield
        return
    handle = _open_lock(path)
    try:
        _wait_for(handle, path, progress)
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    problems = []
    # There; not there; made by another process meanwhile; another user's, to be locked only.  What
    # is there is opened without O_CREAT, which Linux may refuse for files of others.
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDWR, os.O_RDONLY):
        try:
            return open_regular(path, flags)
        except (FileNotFoundError, FileExistsError, PermissionError) as error:
            problems.append(error)
    raise next((x for x in problems if isinstance(x, PermissionError)), problems[0])


def _wait_for(handle: int, path: Path, progress: Callable[[], object]) -> None:
    seen, told = progress(), False
    since = start = time.monotonic()
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        now = time.monotonic()
        if (current := progress()) != seen:
            seen, since = current, now
        if now - since > _PATIENCE:
            raise TimeoutError(errno.ETIMEDOUT, f'another process has held {path} for '
                               f'{_PATIENCE:.0f} s and does not get on; end that process')
        if not told and now - start > 5:
            told = True
            _log.warning('waiting for another process that works on the same file (%s)', path)
        time.sleep(0.05)
