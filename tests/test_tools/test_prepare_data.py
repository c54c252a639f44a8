import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmhybrid import cli
from mmhybrid.cli import data

ROOT = Path(__file__).resolve().parents[2]


def run(arguments):
    return cli.main(['data', *arguments])


@pytest.mark.parametrize('dataset, folder, count', [
    ('mini-coco', 'mini_coco', 2), ('mini-ade20k', 'mini_ade20k/ADEChallengeData2016', 2),
    ('mini-imagenet', 'mini_imagenet', 5)])
def test_mini_sets(dataset, folder, count, tmp_path, capsys):
    command = [dataset, '--root', str(tmp_path), '--train', str(count), '--val', str(count)]
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert f'{dataset} written to {tmp_path / folder}/' in out
    assert 's left' in err and f'{2 * count}/{2 * count} images' in err
    config = data.CONFIGS[dataset]
    assert f'{config} --cfg-options data_root={tmp_path / folder}/' in out
    assert (ROOT / config).is_file()

    assert run(command) == 0
    assert 'nothing to do' in capsys.readouterr().out
    assert run([*command, '--seed', '3']) == 1
    assert 'seed 0 instead of 3' in capsys.readouterr().err
    assert run([*command, '--seed', '3', '--force']) == 0
    marker = json.loads((tmp_path / folder / 'mini_set.json').read_text())
    assert marker['seed'] == 3


def test_a_damaged_mini_set_is_noticed_and_can_be_made_again(tmp_path, capsys):
    command = ['mini-coco', '--root', str(tmp_path), '--train', '2', '--val', '1']
    run(command)
    image = tmp_path / 'mini_coco' / 'train2017' / '000000000002.jpg'
    image.unlink()
    assert run(command) == 1
    err = capsys.readouterr().err
    assert '000000000002.jpg' in err and '--force' in err
    assert run([*command, '--force']) == 0 and image.is_file()


def test_the_configs_read_where_the_tool_writes():
    from mmengine.config import Config
    for dataset, config in data.CONFIGS.items():
        data_root = Config.fromfile(ROOT / config).data_root
        assert data_root == f'data/{data.FOLDERS[dataset]}/'
    for dataset, config in (('coco', 'cascade_mambavision_t_coco.py'),
                            ('ade20k', 'upernet_mambavision_t_ade20k.py')):
        data_root = Config.fromfile(ROOT / 'configs' / config).data_root
        assert data_root == f'data/{data.FOLDERS[dataset]}/'


def test_counts_must_be_positive(tmp_path, capsys):
    assert run(['mini-coco', '--root', str(tmp_path), '--val', '0']) == 1
    assert '--val is 0; expected at least 1 image' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dataset, part', [
    ('coco', 'train2017.zip'), ('ade20k', 'ADEChallengeData2016.zip')])
def test_real_sets_are_checked(dataset, part, tmp_path, capsys):
    assert run([dataset, '--root', str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert part in out and '1 problem(s)' in out


def test_real_sets_are_never_written(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(['coco', '--root', str(tmp_path), '--train', '4'])
    assert '--train is for the mini sets' in capsys.readouterr().err


def test_a_good_set_in_place_of_the_real_one_is_ready(tmp_path, capsys):
    run(['mini-coco', '--root', str(tmp_path), '--train', '2', '--val', '1'])
    (tmp_path / 'mini_coco').rename(tmp_path / 'coco')
    assert run(['coco', '--root', str(tmp_path)]) == 0
    assert f'{tmp_path / "coco"}: ready.' in capsys.readouterr().out


def test_runs_from_a_clone_that_is_not_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'prepare_data.py'), '--help'], cwd=tmp_path,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'mini-coco' in done.stdout
