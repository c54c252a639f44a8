"""The scripts of examples/ do what they say."""

import importlib.util
from pathlib import Path

import exports
import pytest
import small_runs
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_are_tested():
    assert {path.stem for path in EXAMPLES.glob('*.py')} == {'plain_backbone', 'fine_tune'}


def test_plain_backbone():
    losses = example('plain_backbone').main()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_fine_tune(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    folder = exports.coco(tmp_path / 'parts', 3)
    with small_runs.quick():
        drawn = example('fine_tune').fine_tune(
            folder, '--model', 'mambavision-mini', '--head', 'retinanet', '--task', 'detect',
            settings=(
                'train_cfg.max_epochs=1', 'train_cfg.val_interval=1',
                'default_hooks.checkpoint.interval=1', 'train_dataloader.num_workers=0',
                'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0',
                'val_dataloader.persistent_workers=False'))
    assert [path.parent for path in drawn] == [folder / 'mmhybrid/found'] * 3
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_fine_tune_stops_at_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        example('fine_tune').fine_tune(tmp_path / 'nowhere')
    assert stopped.value.code == 1
    assert 'nowhere' in capsys.readouterr().err
