"""Which process is this, and does another one still live?"""
from __future__ import annotations

import os
import re
import socket
import subprocess
from contextlib import suppress

__all__ = ['host', 'lives', 'namespace', 'started']


def host() -> str:
    """Name of this machine, fit for a file name."""
    return re.sub(r'[^0-9A-Za-z._]', '.', socket.gethostname())[:64] or 'unknown'


def namespace() -> str:
    """Within which numbers of processes mean something: containers count their own."""
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''


def started(pid: int) -> str | None:
    """When a process of this machine started, as a word that no later process has; None: unknown.

    Numbers of processes are used again, also after a restart of the machine.
    """
    stat = _stat(pid)
    if stat is not None:
        boot = ''
        with suppress(OSError), open('/proc/sys/kernel/random/boot_id') as file:
            boot = file.read(8)
        return f'{boot}.{stat[19]}'
    if os.name == 'nt' or os.path.exists('/proc/self/stat'):
        return None
    shown = subprocess.run(['ps', '-o', 'lstart=', '-p', str(pid)], capture_output=True, text=True)
    return re.sub(r'[^0-9A-Za-z]+', '.', shown.stdout.strip()) or None


def lives(pid: int, start: str | None) -> bool | None:
    """Whether the process of this number and start is alive; None where that cannot be told."""
    if os.name == 'nt':
        return None  # signal 0 is Ctrl-C there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    stat, now = _stat(pid), started(pid)
    if stat is not None and stat[0] in 'ZX':
        return False  # ended, and its parent has not asked yet
    if None in (now, start):
        return None
    return now == start


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third one on; the second may hold blanks."""
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as file:
            return file.read().rpartition(')')[2].split()
    except OSError:
        return None
