"""Compiled kernels that somebody else has planted, damaged ones, and compilers that misbehave."""
import ctypes
import errno
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mmhybrid import private_files
from mmhybrid.ops.selective_scan import choose_backend, cpp, selective_scan
from mmhybrid.ops.selective_scan.cpp import unavailable_reason as why_not

public = sys.modules[selective_scan.__module__]

pytestmark = [
    pytest.mark.skipif(os.name != 'posix', reason='the kernel is built on POSIX only'),
    pytest.mark.skipif(shutil.which('g++') is None, reason='there is no C++ compiler'),
]
needs_root = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0,
                                reason='only root gives files away')

# What is loaded has these three functions; this compiles in a moment.
SOURCE = f"""
#include <cstdint>
extern "C" {{
void mmhybrid_scan_forward(void*) {{}}
void mmhybrid_scan_backward(void*) {{}}
void mmhybrid_scan_order_fits(void*) {{}}
void mmhybrid_normed_means(void*) {{}}
void mmhybrid_scaled_sum(void*) {{}}
int64_t mmhybrid_scan_arguments() {{ return {ctypes.sizeof(cpp._Arguments)}; }}
}}
"""
PLANTED = """
#include <cstdio>
struct Runs {{ Runs() {{ fclose(fopen("{marker}", "w")); }} }} runs;
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The cache folder, not yet made; a small kernel and plain settings."""
    (tmp_path / 'small.cpp').write_text(SOURCE)
    monkeypatch.setattr(cpp, '_SOURCE', tmp_path / 'small.cpp')
    monkeypatch.setattr(cpp, '_attempts', lambda: [()])
    monkeypatch.setattr(cpp, '_FLAGS', ('-fPIC', '-shared'))
    monkeypatch.setenv('MMHYBRID_CACHE', str(tmp_path / 'mine' / 'cache'))
    monkeypatch.delenv('MMHYBRID_SCAN_BACKEND', raising=False)
    monkeypatch.delenv('CXX', raising=False)
    forget()
    yield tmp_path / 'mine' / 'cache'
    forget()


def forget():
    cpp._library.cache_clear()
    public._say_once.cache_clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Put a shell script in the compiler's place."""
    def write(commands, name='c++'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\n{commands}\n')
        path.chmod(0o755)
        monkeypatch.setenv('CXX', str(path))
        return path
    return write


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'it-ran'


@pytest.fixture
def planted(folder, marker, tmp_path):
    """A library under the right name and checksum that leaves a mark when it is loaded."""
    stem = cpp.build().stem.rpartition('-')[0]
    source = tmp_path / 'planted.cpp'
    source.write_text(SOURCE + PLANTED.format(marker=marker))
    content = cpp._run(['g++', '-fPIC', '-shared', str(source), '-o', str(tmp_path / 'planted')])
    assert content[0] == 0, content
    content = (tmp_path / 'planted').read_bytes()
    for old in folder.glob('*.so'):
        old.unlink()
    path = folder / f'{stem}-{hashlib.sha256(content).hexdigest()}.so'
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def assert_refused(caplog, marker, *said):
    """Automatic choice goes on with one warning, an explicit one stops; nothing ran."""
    forget()
    with caplog.at_level(logging.INFO):
        assert choose_backend() == 'torch' and choose_backend() == 'torch'
    (record,) = (x for x in caplog.records if 'selective_scan' in x.getMessage())
    assert record.levelno == logging.WARNING
    with pytest.raises(RuntimeError, match="backend='cpp', but the compiled scan kernel is not"
                       ) as caught:
        choose_backend('cpp')
    for text in (record.getMessage(), str(caught.value)):
        assert '\n' not in text
        for part in said:
            assert str(part) in text, text
    assert not marker.exists()


def test_a_library_in_an_own_folder_is_loaded(planted, marker):
    """The trap works: what the tests below refuse would run."""
    assert why_not() is None and marker.exists()
    assert choose_backend('cpp') == 'cpp' == choose_backend()


@pytest.mark.parametrize('mode', [0o777, 0o1777, 0o757, 0o702])
def test_folder_for_everybody(planted, folder, marker, caplog, mode):
    folder.chmod(mode)
    assert_refused(caplog, marker, f'everybody may write to {folder} (mode {mode:o}); run: chmod '
                   f'go-w {folder}, or name a folder of your own with the environment variable '
                   'MMHYBRID_CACHE')


@pytest.mark.parametrize('mode', [0o775, 0o770, 0o1770])
def test_folder_for_a_group(planted, folder, marker, caplog, monkeypatch, mode):
    monkeypatch.setattr(private_files, '_only_mine', lambda gid: False)
    folder.chmod(mode)
    assert_refused(caplog, marker, 'the group ', f'may write to {folder} (mode {mode:o}); run: ch')


def test_a_folder_above_for_everybody(planted, folder, marker, caplog):
    folder.parent.chmod(0o777)
    assert_refused(caplog, marker, f'everybody may write to {folder.parent} (mode 777)')
    folder.parent.chmod(0o1777)  # as /tmp: they cannot rename what is not theirs
    forget()
    assert why_not() is None


@needs_root
def test_folder_of_another_user(planted, folder, marker, caplog):
    os.chown(folder, 12345, -1)
    assert_refused(caplog, marker, f'{folder} belongs to the user with the number 12345 and not to '
                   'root', 'chown', 'MMHYBRID_CACHE')


@needs_root
def test_library_of_another_user(planted, marker, caplog):
    os.chown(planted, 12345, -1)
    assert_refused(caplog, marker, f'{planted} belongs to the user with the number 12345', 'remove')


@pytest.mark.parametrize('mode', [0o757, 0o777, 0o666])
def test_library_for_everybody(planted, marker, caplog, mode):
    planted.chmod(mode)
    assert_refused(caplog, marker, f'everybody may write to {planted}', f'chmod go-w {planted}')


def test_link_in_the_place_of_a_library(planted, marker, caplog, tmp_path):
    planted.rename(tmp_path / 'elsewhere.so')
    planted.symlink_to(tmp_path / 'elsewhere.so')
    assert_refused(caplog, marker, f'{planted} is not loaded: it is a link, which is not followed; '
                   'remove it')


def test_pipe_in_the_place_of_a_library(planted, marker, caplog):
    planted.unlink()
    os.mkfifo(planted)
    assert_refused(caplog, marker, f'{planted} is not loaded: it is not a regular file; remove it')


@needs_root
def test_link_to_the_folder_of_another_user(planted, folder, marker, caplog, monkeypatch, tmp_path):
    os.chown(folder, 12345, -1)
    (tmp_path / 'link').symlink_to(folder)
    monkeypatch.setenv('MMHYBRID_CACHE', str(tmp_path / 'link'))
    assert_refused(caplog, marker, f'{folder} belongs to the user with the number 12345')


def test_link_in_the_place_of_the_lock(folder, tmp_path):
    treasure = tmp_path / 'treasure'
    treasure.write_text('precious')
    folder.mkdir(parents=True)
    (folder / 'scan.lock').symlink_to(treasure)
    assert 'it is a link, which is not followed' in why_not() and str(folder) in why_not()
    assert treasure.read_text() == 'precious'


# --- what is odd and right ---


def test_link_to_an_own_folder(monkeypatch, tmp_path):
    (tmp_path / 'large disk').mkdir(mode=0o700)
    (tmp_path / 'link').symlink_to(tmp_path / 'large disk')
    monkeypatch.setenv('MMHYBRID_CACHE', str(tmp_path / 'link'))
    assert why_not() is None and [*(tmp_path / 'large disk').glob('*.so')]


@needs_root
def test_folder_that_root_has_prepared(planted, folder, monkeypatch):
    """An image built by root and used by another user."""
    folder.chmod(0o755)
    monkeypatch.setattr(private_files.os, 'geteuid', lambda: 12345)
    assert why_not() is None


def test_group_of_one(monkeypatch):
    User = namedtuple('User', 'pw_name pw_gid')
    Group = namedtuple('Group', 'gr_name gr_mem')
    monkeypatch.setattr(private_files.pwd, 'getpwuid', lambda uid: User('ada', 1000))
    groups = {1000: Group('ada', []), 1001: Group('ada', []), 100: Group('users', []), 0: None}
    monkeypatch.setattr(private_files.grp, 'getgrgid', lambda gid: groups[gid])
    assert [gid for gid in groups if private_files._only_mine(gid)] == [1000, 0]
    groups[1000] = Group('ada', ['ada'])
    assert private_files._only_mine(1000)
    groups[1000] = Group('ada', ['eve'])
    assert not private_files._only_mine(1000) and not private_files._only_mine(7)


def test_a_library_stays_readable_in_a_folder_that_is_not_writable(folder, monkeypatch):
    cpp.build()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cpp, 'alone', refuse)
    forget()
    assert why_not() is None
    next(folder.glob('*.so')).unlink()
    forget()
    assert f'{folder} cannot be written (Read-only file system); name another' in why_not()


def test_what_is_made_is_private(folder):
    previous = os.umask(0)
    try:
        library = cpp.build()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(library.stat().st_mode) == 0o755
    assert sorted(x.suffix for x in folder.iterdir()) == ['.lock', '.so']


# --- damage ---


@pytest.mark.parametrize('damage', [
    lambda whole: b'', lambda whole: whole[:100], lambda whole: whole[:-1],
    lambda whole: whole[:len(whole) // 2], lambda whole: bytes(len(whole)),
    lambda whole: b'#!/bin/sh\n', lambda whole: whole + b'\0',
    lambda whole: whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]])
def test_damaged_libraries_are_built_again(folder, damage):
    first = cpp.build()
    whole = first.read_bytes()
    first.write_bytes(damage(whole))
    assert why_not() is None
    assert [x.read_bytes() for x in folder.glob('*.so')] == [whole]


def test_a_library_under_another_name_is_not_taken(folder):
    first = cpp.build()
    other = first.with_name(first.name.replace(first.stem[-64:], '0' * 64))
    first.rename(other)
    assert cpp.build() == first and not other.exists()


def test_a_library_that_does_not_load(folder, compiler):
    compiler('for last; do :; done; echo no library > "$last"')
    said = why_not()
    assert str(next(folder.glob('*.so'))) in said and 'cannot be loaded' in said
    assert 'remove it, and it is built again' in said


# --- compilers ---


@pytest.mark.parametrize('cxx', ['g++ -O2', ' g++ ', "g++ '-DA=B C'", 'env g++', '"g++" -g', ''])
def test_compilers_with_options(monkeypatch, cxx):
    monkeypatch.setenv('CXX', cxx)
    assert why_not() is None


def test_options_reach_the_compiler_and_make_another_library(monkeypatch, tmp_path):
    (tmp_path / 'small.cpp').write_text(SOURCE + '#ifdef BAD\n#error bad\n#endif\n')
    first = cpp.build()
    monkeypatch.setenv('CXX', 'g++ -DGOOD')
    assert cpp.build() != first
    monkeypatch.setenv('CXX', 'g++ -DBAD')
    with pytest.raises(cpp.BuildError, match=r'g\+\+ -DBAD could not compile small.cpp \(.*error'):
        cpp.build()


def test_spaces_in_paths(compiler, monkeypatch, tmp_path):
    path = compiler('exec g++ "$@"', 'my tools/c ++')
    monkeypatch.setenv('MMHYBRID_CACHE', str(tmp_path / 'my cache'))
    assert why_not() is None
    forget()
    monkeypatch.setenv('CXX', f"'{path}' -O2")
    assert why_not() is None and len([*(tmp_path / 'my cache').glob('*.so')]) == 2


@pytest.mark.parametrize(('cxx', 'said'), [
    ('no-such-compiler -O2', "no C++ compiler ('no-such-compiler -O2'); install"),
    ('/nowhere/g++', "no C++ compiler ('/nowhere/g++'); install"),
    ('"g++', 'CXX="g++ is no command (No closing quotation); correct it'),
    ('""', 'no C++ compiler'), ('/', 'no C++ compiler'), ('/dev/null', 'no C++ compiler')])
def test_compilers_that_are_none(monkeypatch, cxx, said):
    monkeypatch.setenv('CXX', cxx)
    assert said in why_not()


@pytest.mark.parametrize(('script', 'said'), [
    ('printf "\\377\\376\\033[2Jodd"; exit 1', 'compile small.cpp (\ufffd\ufffd[2Jodd); '),
    ('exit 3', 'could not compile small.cpp (it printed nothing); try another'),
    ('kill -9 $$', 'could not compile small.cpp (it printed nothing); try another'),
    ('exit 0', 'ended without an error and without a library; try another'),
    ('echo one; echo "two" >&2; exit 1', 'could not compile small.cpp (two); try'),
    ('echo "x: No space left on device"; exit 1', 'a disk is full (x: No space left on device)'),
    ('head -c 100000 /dev/zero | tr "\\0" x; exit 1', 'xxx); try another')])
def test_compilers_that_fail(folder, compiler, script, said):
    compiler(script)
    assert said in why_not() and '\n' not in why_not() and len(why_not()) < 1000
    assert [x.name for x in folder.iterdir()] == ['scan.lock']


def test_no_program(compiler):
    path = compiler('')
    path.write_bytes(b'\x7fELF no program')
    assert f'the compiler {path} did not run ([Errno 8] Exec format error' in why_not()


def test_a_compiler_that_hangs_is_ended_with_its_children(folder, compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, '_PATIENCE', 1)
    compiler(f'sleep 600 & echo $! > {tmp_path}/child; wait')
    assert 'did not end within 1 s; try another with the environment variable CXX' in why_not()
    child = int((tmp_path / 'child').read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)
    assert [x.name for x in folder.iterdir()] == ['scan.lock']


def _runs(pid):
    try:
        os.kill(pid, 0)
        return ') Z' not in Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return False


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_folder_that_takes_nothing(folder, monkeypatch, number):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cpp.tempfile, 'TemporaryDirectory', refuse)
    assert f'{folder} cannot be written ({os.strerror(number)}); name another' in why_not()
    assert 'MMHYBRID_CACHE' in why_not()


# --- where the folder is ---


def test_general_cache_folders(monkeypatch, tmp_path):
    monkeypatch.delenv('MMHYBRID_CACHE')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'general'))
    assert cpp._cache_folder() == tmp_path / 'general' / 'mmhybrid'
    for relative in ('', 'general', '~/general', './x'):
        monkeypatch.setenv('XDG_CACHE_HOME', relative)
        assert cpp._cache_folder() == tmp_path / 'home' / '.cache' / 'mmhybrid'
    monkeypatch.setenv('MMHYBRID_CACHE', '~/own')
    assert cpp._cache_folder() == tmp_path / 'home' / 'own'
    monkeypatch.setenv('MMHYBRID_CACHE', 'own')
    assert cpp._cache_folder() == Path.cwd() / 'own'


def test_no_home(monkeypatch):
    monkeypatch.delenv('MMHYBRID_CACHE')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.delenv('HOME')

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(private_files.pwd, 'getpwuid', unknown)
    assert 'no home folder is known to keep the compiled kernel in; name a folder' in why_not()
    assert choose_backend() == 'torch'
    monkeypatch.setenv('MMHYBRID_CACHE', '~nobody-of-this-name/x')
    forget()
    assert 'no home folder is known' in why_not()


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / 'home').write_text('')
    monkeypatch.delenv('MMHYBRID_CACHE')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert f'{tmp_path}/home/.cache/mmhybrid cannot be written (Not a directory)' in why_not()


# --- several processes ---


def _build(results):
    results.send(str(cpp.build()))


def test_two_processes_build_once(folder, compiler, tmp_path):
    compiler(f'echo x >> {tmp_path}/count; sleep 0.2; exec g++ "$@"')
    context = multiprocessing.get_context('fork')
    pipes = [context.Pipe() for _ in range(3)]
    processes = [context.Process(target=_build, args=(theirs,)) for _, theirs in pipes]
    for process in processes:
        process.start()
    assert all(ours.poll(60) for ours, _ in pipes)
    assert len({ours.recv() for ours, _ in pipes}) == 1
    for process in processes:
        process.join()
    assert (tmp_path / 'count').read_text() == 'x\n'


def test_a_killed_process_leaves_no_lock_and_no_litter(folder, compiler):
    compiler('sleep 600')
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe()
    process = context.Process(target=_build, args=(theirs,))
    process.start()
    deadline = time.monotonic() + 60
    while not [*folder.glob('build-*')]:
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [*folder.glob('build-*')]
    compiler('exec g++ "$@"')
    assert why_not() is None
    assert not [*folder.glob('build-*')]


def test_the_real_kernel_still_computes(monkeypatch, tmp_path):
    """Through the same door, with the source that ships."""
    monkeypatch.undo()
    forget()
    if why_not() is not None:
        pytest.skip(why_not())
    x, weights = torch.ones(1, 4, 9), torch.ones(1, 2, 9)
    arguments = (x, x, -torch.ones(4, 2), weights, weights)
    torch.testing.assert_close(selective_scan(*arguments, backend='cpp'),
                               selective_scan(*arguments, backend='reference'))
