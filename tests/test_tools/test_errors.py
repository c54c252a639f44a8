"""Mistakes of users give one block of text that says what to do."""
import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released_files import Hostile

from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.explanations import explain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fails(capfd):
    """Run a tool that must fail; returns what it says after ERROR."""
    def run(tool, *argv):
        capfd.readouterr()
        assert run_command(tool, [str(arg) for arg in argv]) == 1
        output = capfd.readouterr().err
        assert 'Traceback' not in output, output
        assert output.count('ERROR: ') == 1, output
        return output.partition('ERROR: ')[2]
    return run


@pytest.mark.parametrize('kind', ['det', 'seg'])
def test_missing_data(task, fails, kind):
    it = task(kind)
    text = fails(run_train, it.config, '--data-root', 'nowhere')
    assert 'Data not found' in text and '--data-root FOLDER' in text
    assert f'prepare_data.py {"mini-coco" if kind == "det" else "mini-ade20k"}' in text
    for part in (('nowhere/annotations/instances_train2017.json', 'nowhere/val2017/')
                 if kind == 'det' else ('nowhere/images/training/', 'annotations/validation/')):
        assert part in text


def test_data_one_folder_deeper(task, fails, tmp_path):
    task('seg', copy=tmp_path / 'outer' / 'ADEChallengeData2016')
    text = fails(run_train, task('seg').config, '--data-root', tmp_path / 'outer')
    assert f'add --data-root {tmp_path}/outer/ADEChallengeData2016' in text


def test_empty_folder(task, fails, tmp_path):
    it = task('seg', copy=tmp_path / 'copy')
    for image in (tmp_path / 'copy/images/validation').iterdir():
        image.unlink()
    text = fails(run_train, it.config, '--data-root', it.data)
    assert 'images/validation/ is empty' in text


def test_missing_and_damaged_checkpoint(task, fails, tmp_path):
    it = task('det')
    (tmp_path / 'epoch_3.pth').write_bytes(b'PK\x03\x04 cut off')
    text = fails(run_test, it.config, tmp_path / 'epoch_4.pth', '--data-root', it.data)
    assert 'epoch_4.pth does not exist' in text and 'epoch_3.pth' in text
    text = fails(run_test, it.config, tmp_path / 'epoch_3.pth', '--data-root', it.data)
    assert 'epoch_3.pth is cut off' in text and '12 bytes' in text and 'fetch it again' in text
    text = fails(run_train, it.config, '--resume', 'gone.pth', '--data-root', it.data)
    assert 'gone.pth does not exist' in text
    torch.save(dict(state_dict={}, more=Hostile(tmp_path / 'ran')), tmp_path / 'bad.pth')
    for tool, *argv in ((run_test, 'bad.pth'), (run_train, '--resume', 'bad.pth'),
                        (run_train, '--pretrained', 'bad.pth')):
        text = fails(tool, it.config, *argv, '--data-root', it.data, '--work-dir', tmp_path)
        assert 'mkdir, and reading that could run code' in text
        assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('kind', ['det', 'seg'])
def test_class_count_of_heads_and_data(task, fails, kind):
    it = task(kind)
    head = 'model.roi_head.mask_head' if kind == 'det' else 'model.decode_head'
    text = fails(run_train, it.config, '--data-root', it.data, '--cfg-options',
                 f'{head}.num_classes=3')
    total = 80 if kind == 'det' else 150
    assert f'{total} classes' in text and f'{head}.num_classes=3' in text
    assert f'{head}.num_classes={total}' in text  # what to type


def test_categories_of_another_data_set(task, fails, tmp_path):
    it = task('det', copy=tmp_path / 'copy')
    path = tmp_path / 'copy/annotations/instances_train2017.json'
    content = json.loads(path.read_text())
    for category in content['categories']:
        category['name'] = 'my ' + category['name']
    path.write_text(json.dumps(content))
    text = fails(run_train, it.config, '--data-root', it.data)
    assert 'none of the 80 classes' in text and 'my airplane' in text and 'metainfo' in text


def test_checkpoint_of_other_classes(task, fails, tmp_path):
    """mmengine alone logs this and evaluates random weights."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    it = task('seg')
    cfg = Config.fromfile(it.config)
    init_default_scope('mmseg')
    cfg.model.decode_head.num_classes = 7
    model = MODELS.build(cfg.model)
    path = tmp_path / 'seven.pth'
    torch.save(dict(state_dict=model.state_dict(),
                    meta=dict(dataset_meta=dict(classes=tuple('abcdefg')))), path)
    text = fails(run_test, it.config, path, '--data-root', it.data, '--work-dir', tmp_path / 'w',
                 *it.options)
    assert 'decode_head.conv_seg.weight: (7, 48, 1, 1) in the file, (150, 48, 1, 1)' in text
    assert 'trained with 7 classes' in text


@pytest.mark.parametrize('kind, damage, workers', [
    ('det', 'image', 0), ('det', 'image', 1), ('det', 'gone', 0), ('seg', 'image', 1),
    ('seg', 'annotation', 0)])
def test_unreadable_file(task, fails, tmp_path, monkeypatch, kind, damage, workers):
    # As in a large data set, where only some files are looked for before.
    monkeypatch.setattr('mmhybrid.datasets.annotations.SAMPLES', 0)
    it = task(kind, copy=tmp_path / 'copy')
    folder = {'det': 'train2017', 'seg': 'images/training'}[kind]
    if damage == 'annotation':
        folder = 'annotations/training'
    victims = sorted((tmp_path / 'copy' / folder).iterdir())
    for victim in victims:
        if damage == 'gone':
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[:20])
    if damage == 'gone':
        (victims[0].parent / 'other.jpg').touch()
    text = fails(run_train, it.config, '--data-root', it.data, '--work-dir', tmp_path / 'w',
                 *it.options, f'train_dataloader.num_workers={workers}')
    assert any(str(victim) in text for victim in victims)
    assert ('does not exist' if damage == 'gone' else 'cannot be decoded (20 bytes') in text


def test_labels_without_a_class(task, fails, tmp_path):
    """Maps with 150 classes, declared as seven."""
    it = task('seg')
    config = tmp_path / 'seven.py'
    source = f"""_base_ = {it.config!r}
mine = dict(type={{kind}}, metainfo=dict(classes=tuple('abcdefg'), palette=[[0, 0, 0]] * 7),
            img_suffix='.jpg', seg_map_suffix='.png', reduce_zero_label=True)
model = dict(decode_head=dict(num_classes=7), auxiliary_head=dict(num_classes=7))
train_dataloader = dict(dataset=mine)
val_dataloader = dict(dataset=mine)
test_dataloader = dict(dataset=mine)
"""
    config.write_text(source.replace('{kind}', "'BaseSegDataset'"))
    text = fails(run_train, config, '--data-root', it.data, '--work-dir', tmp_path / 'w',
                 *it.options)
    assert 'annotations/training/ADE_train_' in text
    assert 'with 7 classes and reduce_zero_label=True labels are 1 to 7' in text
    config.write_text(source.replace('{kind}', "'ADE20KDataset'").replace(
        "img_suffix='.jpg', seg_map_suffix='.png', ", ''))
    text = fails(run_train, config, '--data-root', it.data, '--work-dir', tmp_path / 'w',
                 *it.options)
    assert 'that the data set type does not have' in text and 'BaseSegDataset' in text


def test_options_that_do_not_fit(task, fails, tmp_path):
    it = task('det')
    text = fails(run_train, it.config, '--auto-scale-lr', '--data-root', it.data,
                 '--cfg-options', 'auto_scale_lr=None')
    assert 'base_batch_size' in text
    text = fails(run_train, it.config, '--amp', '--cfg-options', 'optim_wrapper.type=Other')
    assert 'Other' in text
    text = fails(run_train, it.config, '--data-root', it.data, '--work-dir', tmp_path,
                 '--cfg-options', 'model.backbone.drop_path=0.1')
    assert 'drop_path' in text and 'drop_path_rate' in text
    text = fails(run_train, it.config, '--data-root', it.data, '--work-dir', tmp_path,
                 '--cfg-options', 'optim_wrapper.paramwise_cfg.custom_keys.bakbone.lr_mult=0.1')
    assert "custom_keys.bakbone: no parameter has this in its name. Did you mean 'backbone'" in text
    text = fails(run_train, it.config, '--data-root', it.data, '--launcher', 'pytorch')
    assert 'dist_train.sh' in text
    text = fails(run_test, it.config, __file__, '--out', 'results.txt')
    assert 'not a file of weights' in text


def test_traceback_on_request(task, capfd, monkeypatch):
    assert run_command(run_train, ['gone.py', '--traceback']) == 1
    output = capfd.readouterr().err
    assert 'Traceback' in output and 'There is no config gone.py' in output
    monkeypatch.setenv('MMHYBRID_TRACEBACK', '1')
    assert run_command(run_train, ['gone.py']) == 1
    assert 'Traceback' in capfd.readouterr().err


@pytest.mark.parametrize('error, part', [
    (IndexError('Target 6 is out of bounds.'), 'reduce_zero_label'),
    (RuntimeError('CUDA error: device-side assert triggered'), 'num_classes'),
    (ValueError('need at least one array to concatenate'), 'data set is empty'),
    (OSError(errno.ENOSPC, 'No space left on device'), '--work-dir')], ids=str)
def test_errors_of_others(error, part):
    assert part in explain(error)


def test_work_directory_that_cannot_be(task, fails, tmp_path):
    it = task('det')
    (tmp_path / 'file').touch()
    text = fails(run_train, it.config, '--data-root', it.data, '--work-dir', tmp_path / 'file/w')
    assert 'cannot be made' in text and '--work-dir' in text


def test_unknown_errors_keep_their_traceback(capfd):
    def broken(argv):
        raise RuntimeError('something new')

    assert run_command(broken, []) == 1
    output = capfd.readouterr().err
    assert 'Traceback' in output and 'something new' in output
    assert explain(RuntimeError('something new')) is None


def test_interruption(capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_command(interrupted, []) == 130
    assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_entry_points_work_from_elsewhere_without_installation(tool, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / tool), str(tmp_path / 'gone.py'), 'x.pth'][
            :3 if tool == 'train.py' else 4],
        cwd=tmp_path, capture_output=True, text=True,
        env=dict(PATH='/usr/bin:/bin', OMP_NUM_THREADS='1'))
    assert result.returncode == 1, result.stderr
    assert 'ERROR: There is no config' in result.stderr
    assert 'Traceback' not in result.stderr
