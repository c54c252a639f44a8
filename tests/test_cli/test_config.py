"""`mmhybrid config`: one of our configs as a file that inherits nothing."""

from pathlib import Path

import pytest
from mmengine.config import Config

import mmhybrid
from mmhybrid import cli

NAMES = ('cascade_mambavision_t_coco', 'upernet_vmamba_t_ade20k',
         'classification/localvmamba_mini_imagenet')


@pytest.mark.parametrize('name', NAMES)
def test_what_is_printed_is_the_config(name, capsys, tmp_path):
    assert cli.main(['config', name]) == 0
    text = capsys.readouterr().out
    assert '_base_' not in text
    (tmp_path / 'my.py').write_text(text)
    ours = Config.fromfile(mmhybrid.config_path(f'{name}.py'))
    assert Config.fromfile(tmp_path / 'my.py')._cfg_dict == ours._cfg_dict


@pytest.mark.parametrize('spelling', ['{}', '{}.py', 'mmhybrid::{}.py', 'configs/{}.py'])
def test_spellings(spelling, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['config', spelling.format('cascade_mambavision_t_coco'), '--path']) == 0
    path = capsys.readouterr().out.strip()
    assert path == mmhybrid.config_path('cascade_mambavision_t_coco.py') and Path(path).is_file()


def test_options_and_files_of_ones_own(capsys, tmp_path):
    (tmp_path / 'mine.py').write_text("_base_ = 'mmhybrid::cascade_mambavision_t_coco.py'\n")
    assert cli.main(['config', str(tmp_path / 'mine.py'), '--cfg-options',
                     'train_cfg.max_epochs=3']) == 0
    assert Config.fromstring(capsys.readouterr().out, '.py').train_cfg.max_epochs == 3


@pytest.mark.parametrize(('arguments', 'words'), [
    (['cascade_mambavision_tiny_coco'], "Did you mean 'mmhybrid::cascade_mambavision_t_coco.py'"),
    (['cascade_mambavision_t_coco', '--cfg-options', 'model=1'], 'model is a group of settings'),
    (['cascade_mambavision_t_coco', '--cfg-options', 'x'], 'takes KEY=VALUE')])
def test_mistakes(arguments, words, capsys):
    assert cli.main(['config', *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and 'Traceback' not in error
