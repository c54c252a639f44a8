"""`mmhybrid install-hook` and `uninstall-hook`; tests/test_packaging.py tries what it does."""

import os
import sys

import pytest

from mmhybrid import cli, hook_file


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two places in place of this Python's own."""
    found = [tmp_path / 'site', tmp_path / 'user']
    found[0].mkdir()
    monkeypatch.setattr(hook_file, 'folders', lambda: found)
    return found


def test_there_and_back(folders, capsys):
    path = folders[0] / hook_file.NAME
    assert cli.main(['uninstall-hook']) == 0 and capsys.readouterr().out == 'there is no hook\n'
    for _ in range(2):  # again: the line of a newer mmhybrid
        assert cli.main(['install-hook']) == 0 and capsys.readouterr().out == f'wrote {path}\n'
    assert os.listdir(folders[0]) == [hook_file.NAME] and path.read_text() == hook_file.line()
    assert cli.main(['uninstall-hook']) == 0 and capsys.readouterr().out == f'removed {path}\n'
    assert not path.exists() and not folders[1].exists()


def test_a_folder_that_may_not_be_written_is_passed_over(folders, monkeypatch, capsys):
    monkeypatch.setattr(os, 'access', lambda path, mode: path != folders[0])
    assert cli.main(['install-hook']) == 0
    assert capsys.readouterr().out == f'wrote {folders[1] / hook_file.NAME}\n'


def test_no_place_at_all(folders, monkeypatch, capsys):
    folders.pop()
    folders[0].rmdir()
    folders[0].write_text('a file where the folder should be')
    assert cli.main(['install-hook']) == 1
    error = capsys.readouterr().err
    assert 'The hook cannot be written' in error and '`mmhybrid run`' in error
    assert 'Traceback' not in error


def test_a_full_disk_leaves_no_half_line(folders, monkeypatch, capsys):
    def full(self, text, **more):
        self.touch()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(type(folders[0]), 'write_text', full)
    assert cli.main(['install-hook']) == 1 and 'No space left' in capsys.readouterr().err
    assert os.listdir(folders[0]) == []


def test_the_line_is_harmless_without_mmhybrid_or_mmengine(tmp_path):
    """site.py would print an error of a .pth file at every start of Python."""
    import subprocess

    (tmp_path / hook_file.NAME).write_text(hook_file.line())
    code = f'import site; site.addsitedir({str(tmp_path)!r}); import json; print("fine")'
    done = subprocess.run([sys.executable, '-S', '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'fine\n', '')
