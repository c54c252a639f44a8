"""Two trainings in one work directory."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmhybrid import processes
from mmhybrid.engine import work_dir_lock
from mmhybrid.engine.work_dir_lock import LOCK, WorkDirLock
from mmhybrid.errors import UserError

GONE = 2**22 + 1  # no process has this number


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in ('TORCHELASTIC_RUN_ID', 'SLURM_JOB_ID'):
        monkeypatch.delenv(name, raising=False)


def hold(folder, /, age=0.0, **changes):
    """A lock as another training would have left it ``age`` seconds ago."""
    path = Path(folder) / LOCK
    path.write_text(json.dumps(dict(
        dict(host=processes.host(), namespace=processes.namespace(), pid=GONE, start='x.1',
             job=None, token='t' * 32, since='2026-01-02 03:04:05 +0000'), **changes)))
    made = path.stat().st_mtime
    os.utime(path, (made - age, made - age))
    return path


def holder(folder):
    return json.loads((Path(folder) / LOCK).read_text())


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_free_folder(tmp_path):
    lock = WorkDirLock(str(tmp_path))
    assert lock.acquire() == [] and names(tmp_path) == [LOCK]
    held = holder(tmp_path)
    assert held['pid'] == os.getpid() and held['host'] == processes.host()
    lock.release()
    lock.release()
    assert names(tmp_path) == []
    assert not lock._thread.is_alive()


def test_other_ranks_hold_nothing(tmp_path):
    lock = WorkDirLock(str(tmp_path), rank=1)
    assert lock.acquire() == [] and names(tmp_path) == []
    lock.release()


def test_the_second_is_refused_while_the_first_lives(tmp_path):
    first, second = WorkDirLock(str(tmp_path)), WorkDirLock(str(tmp_path))
    first.acquire()
    with pytest.raises(UserError) as caught:
        second.acquire()
    text = str(caught.value)
    assert f'works in {tmp_path}: process {os.getpid()} on {processes.host()}, since 20' in text
    assert 'it runs on this machine' in text and '--work-dir' in text
    assert f'remove {tmp_path}/{LOCK}' in text
    second.release()
    assert names(tmp_path) == [LOCK]  # it is the first one's
    first.release()
    assert second.acquire() == []
    second.release()


@pytest.mark.parametrize('changes', [
    dict(pid=GONE), dict(pid=os.getpid(), start='earlier.1'), dict(pid=2**40)])
def test_dead_on_this_machine(tmp_path, changes):
    """The number may be that of another process by now; a fresh file proves nothing."""
    hold(tmp_path, **changes)
    lock = WorkDirLock(str(tmp_path))
    note, = lock.acquire()
    assert f'Process {changes["pid"]} on {processes.host()}' in note and 'taken over' in note
    assert names(tmp_path) == [LOCK] and holder(tmp_path)['pid'] == os.getpid()
    lock.release()


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='/proc is of Linux')
def test_ended_but_not_yet_collected(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', ''])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.lives(child.pid, processes.started(child.pid)) is False
    child.wait()
    assert processes.lives(os.getpid(), processes.started(os.getpid())) is True
    assert processes.lives(1, None) is None  # there, and its start is not known to be the same


@pytest.mark.parametrize('other', [dict(host='elsewhere'), dict(namespace='pid:[1]')])
@pytest.mark.parametrize('age, alive', [(-50, True), (20, True), (170, True), (190, False)])
def test_another_machine_is_dead_after_three_minutes(tmp_path, other, age, alive):
    hold(tmp_path, age, **other)
    lock = WorkDirLock(str(tmp_path))
    if alive:
        with pytest.raises(UserError, match=rf'sign of life is {max(age, 0)} seconds old'):
            lock.acquire()
        assert names(tmp_path) == [LOCK] and holder(tmp_path)['token'] == 't' * 32
    else:
        assert 'taken over' in lock.acquire()[0]
    lock.release()


def test_clocks_may_differ(tmp_path, monkeypatch):
    """Only the times of files are compared."""
    hold(tmp_path, 20, host='elsewhere')
    monkeypatch.setattr('time.time', lambda: 1e12)
    with pytest.raises(UserError, match='20 seconds old'):
        WorkDirLock(str(tmp_path)).acquire()


@pytest.mark.parametrize('name, value, free', [
    ('SLURM_JOB_ID', '77', True), ('TORCHELASTIC_RUN_ID', 'abc', True),
    ('TORCHELASTIC_RUN_ID', 'none', False)])
def test_the_same_job_may_restart_elsewhere(tmp_path, monkeypatch, name, value, free):
    monkeypatch.setenv(name, value)
    hold(tmp_path, 1, host='elsewhere', job=f'{name}={value}')
    lock = WorkDirLock(str(tmp_path))
    if free:
        assert 'taken over' in lock.acquire()[0]
    else:  # what torchrun says when nobody named the run
        with pytest.raises(UserError, match='elsewhere'):
            lock.acquire()
    lock.release()


def test_a_copy_of_a_work_directory_is_free(tmp_path):
    """Also while the original is in use, and with a fresh lock of another machine."""
    source, target = tmp_path / 'a', tmp_path / 'b'
    source.mkdir()
    lock = WorkDirLock(str(source))
    lock.acquire()
    shutil.copytree(source, target)
    hold(target, **dict(holder(source), host='elsewhere'))
    copy = WorkDirLock(str(target))
    assert copy.acquire() == [f'The lock in {target} came with a copy of {source}; it was '
                              'replaced.']
    copy.release()
    shutil.copytree(source, target, dirs_exist_ok=True)
    copy = WorkDirLock(str(target))
    assert len(copy.acquire()) == 1
    copy.release()
    lock.release()


@pytest.mark.parametrize('path, number', [('/elsewhere', None), (None, 1)])
def test_another_path_or_number_alone_is_no_copy(tmp_path, path, number):
    """Mounts give one folder several paths; some network drives number anew."""
    hold(tmp_path, host='elsewhere', folder=[path or str(tmp_path.resolve()),
                                             number or tmp_path.stat().st_ino])
    with pytest.raises(UserError, match='elsewhere'):
        WorkDirLock(str(tmp_path)).acquire()


@pytest.mark.parametrize('folder', [None, 'x', [], ['a', 1, 2], 7])
def test_locks_without_a_folder(tmp_path, folder):
    hold(tmp_path, host='elsewhere', folder=folder)
    with pytest.raises(UserError, match='elsewhere'):
        WorkDirLock(str(tmp_path)).acquire()


def test_twice_in_one_allocation_is_twice(tmp_path, monkeypatch):
    """A shell within salloc: the same job, and the first one runs before our eyes."""
    monkeypatch.setenv('SLURM_JOB_ID', '77')
    first = WorkDirLock(str(tmp_path))
    first.acquire()
    with pytest.raises(UserError, match='runs on this machine'):
        WorkDirLock(str(tmp_path)).acquire()
    first.release()


@pytest.mark.parametrize('content', [
    b'', b'{', b'\xff\xfe', b'[]', b'{"pid": 1}', b'{"pid": "1", "host": "a"}', b'[' * 100_000,
    b'null', b'{"pid": true}'])
def test_damaged_locks(tmp_path, content):
    path = tmp_path / LOCK
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        WorkDirLock(str(tmp_path)).acquire()
    assert 'cannot be read' in str(caught.value) and f'remove {path}' in str(caught.value)
    assert path.read_bytes() == content and names(tmp_path) == [LOCK]
    os.utime(path, (1, 1))
    lock = WorkDirLock(str(tmp_path))
    assert 'was damaged' in lock.acquire()[0]
    lock.release()


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=f'{LOCK} is a folder'):
        WorkDirLock(str(tmp_path)).acquire()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, 'Permission denied', path)
    monkeypatch.setattr(work_dir_lock, 'write_aside', refuse)
    with pytest.raises(UserError, match='cannot be written: Permission denied.*--work-dir'):
        WorkDirLock(str(tmp_path)).acquire()


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(os, 'link', refuse)
    lock = WorkDirLock(str(tmp_path))
    assert lock.acquire() == []
    with pytest.raises(UserError, match='runs on this machine'):
        WorkDirLock(str(tmp_path)).acquire()
    lock.release()
    assert names(tmp_path) == []


def test_two_that_find_the_same_dead_one(tmp_path, monkeypatch):
    """The slower one must not throw away what the faster one has put there."""
    hold(tmp_path)
    fast, slow = WorkDirLock(str(tmp_path)), WorkDirLock(str(tmp_path))
    rename, calls = os.rename, []

    def later(source, target):
        if not calls:
            calls.append(source)
            fast.acquire()  # the whole of it, between the look and the step of the slow one
        rename(source, target)

    monkeypatch.setattr(os, 'rename', later)
    with pytest.raises(UserError, match='runs on this machine'):
        slow.acquire()
    assert holder(tmp_path) == fast._own and names(tmp_path) == [LOCK]
    fast.release()


def test_two_at_the_same_instant(tmp_path, monkeypatch):
    first, second = WorkDirLock(str(tmp_path)), WorkDirLock(str(tmp_path))
    link = os.link

    def later(source, target):
        monkeypatch.setattr(os, 'link', link)
        first.acquire()
        link(source, target)

    monkeypatch.setattr(os, 'link', later)
    with pytest.raises(UserError, match='runs on this machine'):
        second.acquire()
    assert holder(tmp_path) == first._own
    first.release()


def test_signs_of_life(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(work_dir_lock, 'print_log', lambda text, **_: said.append(text))
    lock = WorkDirLock(str(tmp_path))
    lock.acquire()
    path = tmp_path / LOCK
    os.utime(path, (1, 1))
    assert lock.beat() and path.stat().st_mtime > 1
    path.unlink()  # somebody was sure
    assert lock.beat() and holder(tmp_path) == lock._own
    hold(tmp_path, host='elsewhere', pid=12)
    assert not lock.beat()
    text, = said
    assert 'Another training took over' in text and 'process 12 on elsewhere' in text
    lock.release()
    assert holder(tmp_path)['host'] == 'elsewhere'


def test_names_of_machines_fit_file_names(monkeypatch):
    monkeypatch.setattr(socket, 'gethostname', lambda: 'a b/ü-1')
    assert processes.host() == 'a.b...1'
    monkeypatch.setattr(socket, 'gethostname', lambda: '')
    assert processes.host() == 'unknown'
