"""The command line as a whole: every subcommand looks and ends alike."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmhybrid import cli

ROOT = Path(__file__).resolve().parents[2]
NAMES = cli.names()
# Each script of tools/ is one subcommand.
TOOLS = {'train': 'train', 'test': 'test', 'search_directions': 'search', 'get_flops': 'flops',
         'convert_checkpoint': 'convert', 'visualize': 'visualize', 'prepare_data': 'data',
         'map_labels': 'map-labels'}


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, '--help'])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('name', NAMES)
def test_every_command_has_an_example_and_traceback(name, capsys):
    text = help_of(capsys, name)
    module = cli.command(name)
    assert f'usage: mmhybrid {name} ' in text and '--traceback' in text
    assert module.__doc__.splitlines()[0] in text
    for line in module.EXAMPLE.splitlines():
        assert f'mmhybrid {name}' in line and f'\n  {line}\n' in f'{text}\n'
    assert text.count('--traceback') == 2  # usage and list: nobody has added it twice


def test_help_is_quick():
    """It imports the modules of all commands, and they nothing but the standard library."""
    commands = [[], *([name] for name in NAMES if name != 'flops')]  # its conventions need torch
    code = (
        'import sys\nfrom mmhybrid.cli import main\n'
        f'for command in {commands}:\n'
        '    try:\n        main([*command, "--help"])\n    except SystemExit as end:\n'
        '        assert end.code == 0\n'
        '    print(command, {"torch", "numpy", "mmengine", "mmcv", "PIL"} & {*sys.modules})\n')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    for command in commands:
        assert f'{command} set()' in done.stdout.splitlines(), done.stderr


def test_the_overview_lists_all(capsys):
    words = ' '.join(help_of(capsys).split())
    for name in NAMES:
        assert f' {name} {cli.command(name).__doc__.splitlines()[0].rstrip(".")}' in words
    assert '2 wrong usage' in words


@pytest.mark.parametrize(('arguments', 'words'), [
    ([], 'required: COMMAND'), (['trian'], "invalid choice: 'trian'"),
    (['--nonsense'], 'required: COMMAND'), (['data', 'mini-koko'], "invalid choice: 'mini-koko'"),
    (['memory', 'VMamba:tiny'], 'required: --gpu'),
    (['convert', 'a', 'b.pth', '--restore', '--key', 'model'], 'belong to a plain conversion'),
])
def test_wrong_usage_ends_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [
    ['train', 'nowhere.py'], ['data', 'mini-coco', '--val', '0', '--root', 'x'],
    ['map-labels', 'nowhere', 'out', '0=1']], ids=lambda it: it[0])
def test_failures_end_with_1_and_one_block_of_text(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count('ERROR: ') == 1 and 'Traceback' not in error
    assert cli.main([*arguments, '--traceback']) == 1
    error = capsys.readouterr().err
    assert error.count('ERROR: ') == 1 and 'Traceback' in error
    monkeypatch.setenv('MMHYBRID_TRACEBACK', '1')
    assert cli.main(arguments) == 1 and 'Traceback' in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    for name in ('data', 'flops'):
        monkeypatch.setattr(cli.command(name), 'run', interrupted)
    assert cli.main(['data', 'mini-coco']) == cli.main(['flops', 'VMamba:tiny']) == 130
    assert capsys.readouterr().err.count('Stopped.') == 2


def test_tools_are_subcommands():
    scripts = {path.stem for path in (ROOT / 'tools').glob('*.py')} - {'dist_launch'}
    assert scripts == set(TOOLS) and set(TOOLS.values()) <= set(NAMES)
    for script, name in TOOLS.items():
        assert f"tool('{name}')" in (ROOT / 'tools' / f'{script}.py').read_text()


def test_a_tool_is_called_by_its_own_name(tmp_path):
    """From a clone that is not installed, and from any folder."""
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'map_labels.py'], cwd=tmp_path, capture_output=True,
        text=True)
    assert done.returncode == 2 and 'usage: map_labels.py [-h]' in done.stderr
